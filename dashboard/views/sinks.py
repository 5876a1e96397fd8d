"""Sinks: the tokens on which attention drains, and the heads that drain there."""

import streamlit as st

from headwater.analyses._catalogue.catalogue import entry
from headwater.dashboard import export, pages, runs
from headwater.dashboard.figures.heads import head_grid
from headwater.dashboard.figures.labels import escaped
from headwater.dashboard.figures.tokens import token_bars
from headwater.dashboard.runs import Run
from headwater.dashboard.state import KEY, State
from headwater.dashboard.widgets import chart, clicked, numbers, quoted, token_name

RULES = {
    "share": ("A share above 0.3", "share above 0.3 over the whole prompt"),
    "gu": ("A share above 0.3 within the first 64 tokens", "Gu et al., ICLR 2025"),
    "act": (
        "A share far above an even spread",
        "share above 5 / tokens, each head's first one left out; Yu et al., ICML 2024",
    ),
}


def draw_heads(run: Run, state: State) -> None:
    """How much of each head drains on one token; a click opens the head."""
    left, right = st.columns(2)
    positions = range(run.length)
    key = left.selectbox(
        "Token", positions, format_func=lambda p: token_name(run.tokens, p), key="sink-token"
    )
    limit = entry("sink_rate").setting("threshold")
    threshold = right.slider(
        "Counts as a sink above a share of",
        limit.bounds.low,
        limit.bounds.high,
        limit.default,
        0.05,
        key="threshold",
    )
    result = entry("sink_rate").function(run.record, threshold=threshold, key=key)
    name = f"{quoted(run.tokens[key])} (token {key})"
    share = result["received_share"]
    figure, rate = st.columns([4, 1], vertical_alignment="center")
    rate.metric(
        "Sink rate",
        f"{float(result['sink_rate']):.1%}",
        help="heads whose share on this token exceeds the limit",
    )
    with figure:
        title = escaped(f"Share of its attention that each head gives to {name}")
        drawn = head_grid(share, title, "share", (0.0, 1.0), (state.layer, state.head))
        picked = clicked(drawn, "sink-heads", f"Share of attention on token {key}: layers down, heads across")
    st.caption("Share: mean weight over the tokens that can see it. Click a head to open it.")
    numbers(f"sink-share-token-{key}", export.table(share, "share"), "sink-numbers")
    if picked:
        state.choose_head(int(picked["y"]), int(picked["x"]))
        st.switch_page(pages.page("head"))


def draw_tokens(run: Run) -> None:
    """Which tokens are sinks by a published rule, and for how many heads."""
    rule = st.selectbox(
        "What counts as a sink", list(RULES), format_func=lambda name: RULES[name][0], key="sink-rule"
    )
    found = entry("find_sinks").function(run.record, rule=rule)
    heads = found["heads"].isel(batch=0).values
    title = "Which tokens are sinks"
    figure = token_bars(heads, run.tokens, title, "fraction of heads", limit=1.0, subtitle=RULES[rule][1])
    chart(figure, "sink-bars", "Fraction of heads for which each token is a sink")
    listing = export.columns(found, "found", ("layer", "head", "position", "token", "score"))
    heads_in_all = run.record.n_heads * len(run.record.layers)
    st.caption(
        f"{len(listing)} pairs of head and token, of {heads_in_all} heads. The last tokens are seen by few others, so "
        "their shares rest on few weights."
    )
    numbers(f"sinks-{rule}", listing, "found-numbers")


state: State = st.session_state[KEY]
run = runs.base_run(state.model, state.prompt)
st.header("Sinks")
st.caption(
    "A sink is a token that gets far more attention than its content explains, most often the first one."
)
draw_heads(run, state)
draw_tokens(run)
