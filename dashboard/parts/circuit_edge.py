"""What the page Circuits shows of one edge: its weight, the maps of its heads, and what the measure is without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from headwater.dashboard import pages
from headwater.dashboard.parts import attention
from headwater.dashboard.parts.circuits import EDGE
from headwater.dashboard.parts.job import wait
from headwater.dashboard.running import circuits
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.pairs import Corrupt
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import session
from headwater.dashboard.state.address import to_address
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import plain
from headwater.lens.errors import HeadwaterError


def draw_edge(state: State, run: Run, chosen: Measure, edges: pd.DataFrame, other: Corrupt | None) -> None:
    """The chosen edge: its weight, the maps of its heads, and what the measure is without it."""
    pick = state.get(EDGE)
    if not isinstance(pick, int) or not 0 <= pick < len(edges):
        return
    edge = edges.iloc[pick]
    ends = [circuits.head_of(edge["sender"]), circuits.head_of(edge["reader"])]
    into = f" ({edge['input']})" if edge["input"] else ""
    st.subheader(plain(f"Edge {edge['sender']} → {edge['reader']}{into}: {edge['weight']:.4g}"))
    with st.container(horizontal=True):
        for name, head in zip(("sender", "reader"), ends, strict=True):
            if head is not None and st.button(f"Open head {head[0]}\\.{head[1]}", key=f"open-{name}"):
                state.choose_head(*head)
                place = circuits.position_of(edge[name])
                state.query = place if place is not None else state.query
                st.switch_page(pages.page("head"), query_params=to_address(state))
        if None not in ends:
            name = ">".join(f"{layer}.{head}" for layer, head in ends)  # type: ignore[misc]
            label = "Unpin edge" if name in state.pins else "Pin edge"
            if st.button(label, key="pin-edge"):
                state.pin(name)
                session.again()
    found = [head for head in dict.fromkeys(ends) if head is not None and head[0] in run.layers]
    if found:
        for column, (layer, head) in zip(st.columns(len(found)), found, strict=True):
            with column:
                attention.draw_head(state, run, f"map-edge-{layer}-{head}", layer, head)
    _draw_check(state, run, chosen, edge, ends, other)


def _draw_check(
    state: State, run: Run, chosen: Measure, edge: pd.Series, ends: list[tuple[int, int] | None], other: Corrupt | None
) -> None:  # fmt: skip
    """The measure without the edge, and without either head, by runs."""
    wanted = (str(edge["sender"]), str(edge["reader"]), str(edge["input"]))
    if st.session_state.get("circuit-check") != wanted:
        if st.button(
            "Verify by ablation", key="verify-edge", help=plain(f"runs the model; of {chosen.label}")
        ):
            st.session_state["circuit-check"] = wanted
            st.rerun()
        return
    key = ("edge-check", *run.identity, *chosen.key, *wanted, other.key if other else None)
    sender, node = (str(edge[end]).partition("@")[0] for end in ("sender", "reader node"))

    def work() -> dict[str, float | str | None]:
        plain_value = chosen.value(run)
        tried: dict[str, Any] = {"as it is": plain_value}
        if node:
            cut = lambda: circuits.without_edge(  # noqa: E731
                state, run, chosen, other.example if other else None, sender, node
            )
            tried[f"without the edge {sender} → {node}"] = _value(cut)
        for head in dict.fromkeys(each for each in ends if each is not None):
            name = f"{head[0]}.{head[1]}"
            tried[f"without head {name}"] = _value(
                lambda name=name: circuits.without_head(state, run, chosen, name)
            )
        return tried

    told = wait(key, work, "the check of the edge", model=run.name)
    if told is None:
        return
    before = told["as it is"]
    rows = []
    for name, value in told.items():
        number = value if isinstance(value, float) else np.nan
        rows.append(
            {
                "run": name, chosen.kind.replace("_", " "): number, "change": number - before,
                "note": value if isinstance(value, str) else "",
            }
        )  # fmt: skip
    st.dataframe(
        pd.DataFrame(rows), hide_index=True, key="edge-check", alt=f"{chosen.label} with and without the edge"
    )
    how = "what the corrupt prompt puts there" if other else "nothing (no corrupt prompt)"
    st.caption(
        plain(
            f"{chosen.label}, {chosen.unit}. The edge, at all tokens, carries {how}; a head without its output is 0."
        )
    )


def _value(work: Any) -> float | str | None:
    try:
        return work()
    except HeadwaterError as error:
        return str(error)
