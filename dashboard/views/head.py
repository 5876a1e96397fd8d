"""Head: the attention map of one head with its tokens, a window to zoom into, and one token's view of it."""

import streamlit as st

from headwater.dashboard import export, runs, scores
from headwater.dashboard.figures.labels import escaped
from headwater.dashboard.figures.pattern import pattern_map
from headwater.dashboard.figures.pooling import MOST_CELLS, pool_blocks
from headwater.dashboard.runs import Run
from headwater.dashboard.state import KEY, State
from headwater.dashboard.tokens import choose_token, draw_strip
from headwater.dashboard.widgets import chart, numbers, plain, quoted


def window(label: str, run: Run, key: str) -> slice:
    """A range of positions; the whole prompt to begin with."""
    if run.length == 1:
        return slice(0, 1)
    first, last = st.slider(label, 0, run.length - 1, (0, run.length - 1), key=f"{key}-{run.length}")
    return slice(first, last + 1)


def draw_map(run: Run, state: State) -> None:
    name = f"{state.layer}.{state.head}"
    with st.container(horizontal=True, gap="large"):
        queries = window("Queries shown", run, "queries")
        keys = window("Keys shown", run, "keys")
    exclude = st.toggle(
        "Leave position 0 out of the colour scale",
        key="exclude-first",
        help="Shows the structure under a strong sink. No number changes.",
    )
    received, entropy = scores.margins(run, state.layer, state.head)
    shape = (queries.stop - queries.start, keys.stop - keys.start)
    if max(shape) <= MOST_CELLS:
        weights = runs.pattern(run, state.layer, state.head, queries, keys)
        frame = export.pairs(weights, run.tokens, queries.start, keys.start)
    else:
        weights = pool_blocks(runs.rows(run, state.layer, state.head, queries, keys), shape)
        frame = None
    figure = pattern_map(
        weights,
        run.tokens[queries],
        run.tokens[keys],
        f"Head {name}: who attends to whom",
        first_query=queries.start,
        first_key=keys.start,
        received=received.values[keys],
        entropy=entropy.values[queries],
        exclude_first=exclude,
    )
    chart(figure, "pattern", f"Attention of head {name}: queries down, keys across")
    st.caption(
        "Margins are exact and over the whole prompt: above, the mean weight a key receives from the tokens that can "
        "see it; right, how widely a query spreads its attention. Drag in the map to zoom, double-click to return."
    )
    if frame is None:
        st.caption(
            f"For exact cells and their download choose a window of at most {MOST_CELLS} tokens a side."
        )
    else:
        numbers(f"attention-{name}", frame, "pattern-numbers")


def draw_token(run: Run, state: State) -> None:
    name = f"{state.layer}.{state.head}"
    position = choose_token(run, state)
    weights = runs.pattern(run, state.layer, state.head, queries=slice(position, position + 1))[0]
    title = escaped(f"Where {quoted(run.tokens[position])} (token {position}) looks")
    draw_strip(weights, run, state, title, "weight", (0.0, 1.0), "row")
    row = export.per_token(weights, run.tokens, "weight")
    top = row.nlargest(3, "weight")
    listing = (
        f"{quoted(token)} {weight:.3f}" for token, weight in zip(top["token"], top["weight"], strict=True)
    )
    st.caption(plain("Strongest: " + ", ".join(listing)))
    numbers(f"attention-{name}-token-{position}", row, "row-numbers")


state: State = st.session_state[KEY]
run = runs.base_run(state.model, state.prompt)
st.header(f"Head {state.layer}.{state.head}")
draw_map(run, state)
draw_token(run, state)
