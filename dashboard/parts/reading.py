"""How to read one head: the row of a token, why it looks there, what it writes, whether that is typical."""

from __future__ import annotations

import numpy as np
import streamlit as st

from headwater.analyses._catalogue.catalogue import entry
from headwater.dashboard import pages, tables
from headwater.dashboard.charts.terms import term_bars
from headwater.dashboard.figures.labels import escaped
from headwater.dashboard.figures.tokens import MOST_IN_A_STRIP, token_strip
from headwater.dashboard.parts import attention
from headwater.dashboard.parts.job import fitting
from headwater.dashboard.parts.scores import has_roles, roles_of
from headwater.dashboard.running import head as of_head, runs
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.prompts import prompts_for
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import session
from headwater.dashboard.state.address import to_address
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import chart, numbers, plain, quoted

MOST_PINNED = 4


def same_heads(one: Run, other: Run) -> bool:
    return (one.layers, one.n_heads) == (other.layers, other.n_heads)


def same_tokens(one: Run, other: Run) -> bool:
    """Whether two runs have maps of the same tokens and heads, so that these can be taken from each other."""
    return same_heads(one, other) and (one.queries, one.keys) == (other.queries, other.keys)


def draw_others(state: State, run: Run) -> None:
    """The pinned heads, up to four, on one scale."""
    names = [name for name in state.pins if ">" not in name and name != f"{state.layer}.{state.head}"]
    found = [tuple(map(int, name.split("."))) for name in names]
    found = [(layer, head) for layer, head in found if layer in run.layers and head < run.n_heads][
        :MOST_PINNED
    ]
    if not found:
        return
    st.subheader("Pinned heads")
    for column, (layer, head) in zip(st.columns(len(found)), found, strict=True):
        with column:
            attention.draw_head(state, run, f"pinned{layer}_{head}", layer, head)


def draw_cell(state: State, run: Run, query: int) -> None:
    """What can be done with the chosen pair."""
    key = state.key
    if key is None or key >= len(run.keys) or (run.causal and key > query):
        return
    name = f"{state.layer}.{state.head}"
    if st.button(
        plain(f"Cut {quoted(run.queries[query])} → {quoted(run.keys[key])}"), key="cut-pair",
        help="run B: this token can no longer look there in this head",
    ):  # fmt: skip
        cut = {"edit": "Knockout", "queries": [query], "keys": [key], "heads": [name], "layers": "all"}
        state.edits.append(state.on_part(cut))
        session.again()
    if st.button("Trace back", key="trace-pair", help="which heads made this head look there"):
        state.settings |= {"circuits.method": "trace", "circuits.root": "head"}
        st.switch_page(pages.page("circuits"), query_params=to_address(state))


def draw_row(state: State, run: Run, query: int) -> None:
    """Where the token looks, as the input with its weights, and the strongest in words."""
    weights = runs.pattern(run, state.layer, state.head, queries=slice(query, query + 1))[0]
    named = f"{quoted(run.queries[query])} (token {query})"
    figure = None
    if len(run.keys) <= MOST_IN_A_STRIP:
        figure = token_strip(weights, run.keys, escaped(f"Where {named} looks"), "weight", None, None)
        chart(figure, "row", f"Weights of {named}: {_strongest(weights, run)}")
    st.caption(plain(f"Strongest of {named}: {_strongest(weights, run)}"))
    frame = tables.per_token(weights, run.keys, "weight")
    numbers(f"attention-{state.layer}.{state.head}-token-{query}", frame, "row-numbers", figure)


def _strongest(weights: np.ndarray, run: Run) -> str:
    ranked = np.argsort(-np.nan_to_num(weights), kind="stable")[:3]
    return ", ".join(f"{quoted(run.keys[n])} {weights[n]:.3f}" for n in ranked)


def draw_why(state: State, run: Run, query: int) -> None:
    st.subheader("Why it looks there")
    weights = runs.pattern(run, state.layer, state.head, queries=slice(query, query + 1))[0]
    key = state.key
    if key is None or key >= len(run.keys) or not np.isfinite(weights[key]) or (run.causal and key > query):
        key = int(np.nanargmax(weights))
    named = f"{quoted(run.queries[query])} → {quoted(run.keys[key])}"
    asked = ("why", run.identity, state.layer, state.head, query, key)
    work = lambda: of_head.why(state, run, query, key)  # noqa: E731
    found = fitting(asked, work, "why it looks there", model=run.name, lane="light")
    if found is None:
        return
    total = found["score"].sum()
    names = [f"{line.query_part} · {line.key_part}" for line in found.head(12).itertuples()]
    figure = term_bars(
        names, found["score"].head(12).to_numpy(), escaped(f"Score of {named}: {total:.3g}"), "score",
        "what the query is made of · what the key is made of",
    )  # fmt: skip
    chart(figure, "why", f"Largest terms of the score of {named}: {_listed(names, found['score'])}")
    numbers("why-it-looks-there", found, "why-numbers", figure)
    _not_for("qk_decomposition")


def draw_writes(state: State, run: Run, chosen: Measure) -> None:
    st.subheader("What it writes")
    asked = ("writes", run.identity, state.layer, state.head, chosen.key)
    work = lambda: of_head.writes(state, run, chosen)  # noqa: E731
    found = fitting(asked, work, "what it writes", model=run.name, lane="light")
    if found is None:
        return
    total, values = found["logit"].sum(), found["logit"].to_numpy()
    order = np.argsort(-np.abs(values), kind="stable")[:12]
    names = [f"{n} {run.keys[n]}" for n in order]
    label = chosen.label.replace("log p", "logit ")
    figure = term_bars(
        names, values[order], escaped(f"Moved into {label}: {total:.3g}"), "logit", "by source token"
    )
    chart(figure, "writes", f"What the head moves into {label}, by token: {_listed(names, values[order])}")
    numbers("what-it-writes", found, "writes-numbers", figure)
    _not_for("ov_decomposition")


def draw_typical(state: State, run: Run) -> None:
    """The head's simple jobs, and its strongest pairs over example texts."""
    model = runs.model_of(state, run)
    if not (model.causal and model.has_lm_head and model.tokenizer is not None) or state.picture:
        return
    st.subheader("Is it typical")
    left, right = st.columns(2)
    with left:
        known = roles_of(state, run) if has_roles(run) else None
        if known is not None:
            found = of_head.roles(known, state.layer, state.head)
            st.dataframe(
                found, hide_index=True, key="roles-table", alt="Simple jobs of the head",
                column_config={"score": st.column_config.NumberColumn(format="%.3f"),
                               "above": st.column_config.ProgressColumn("more than", format="percent")},
            )  # fmt: skip
            _not_for("head_roles")
    with right:
        texts = _texts(state, run)
        key = ("recorded", run.name, run.part, run.edits, tuple(texts))
        work = lambda: of_head.recorded(state, run, texts)  # noqa: E731
        records = fitting(key, work, "example texts", model=run.name, lane="light")
        if records is not None:
            found = of_head.typical(records, state.layer, state.head)
            st.dataframe(
                found, hide_index=True, key="typical-table", alt="Strongest pairs over example texts"
            )
            st.caption(
                f"The strongest pairs over {len(texts)} example texts, without the first token and itself."
            )


def _texts(state: State, run: Run) -> list[str]:
    return list(prompts_for(runs.model_of(state, run)).values())[:12] or [state.text]


def _not_for(name: str) -> None:
    st.caption(plain(f"Not for: {entry(name).not_for}."))


def _listed(names, values) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in list(zip(names, values, strict=False))[:5])
