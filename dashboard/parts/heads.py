"""The pieces of the page Heads: how heads are drawn, ranked, chosen, pinned and removed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
import streamlit as st
import xarray as xr

import headwater as hw
from headwater.dashboard import pages
from headwater.dashboard.canvas.grid import grid
from headwater.dashboard.canvas.mosaic import mosaic, weights_in
from headwater.dashboard.charts.pruning import pruning_figure
from headwater.dashboard.charts.scatter import head_scatter
from headwater.dashboard.figures.heads import head_grid
from headwater.dashboard.parts import scores as parts
from headwater.dashboard.running.runs import Run
from headwater.dashboard.running.scores import Score
from headwater.dashboard.state import session
from headwater.dashboard.state.address import to_address
from headwater.dashboard.state.state import State
from headwater.dashboard.tables import extremes, table
from headwater.dashboard.widgets import CHART, chart, downloads, numbers, plain

TURN = "heads-turn"  # counts the heads chosen elsewhere than in the table, whose mark then has to move


def take(event: dict[str, Any]) -> None:
    """A click on a head chooses it; with Shift or Ctrl it pins it."""
    state = session.current()
    if "pin" in event:
        layer, head = event["pin"]
        state.pin(f"{layer}.{head}")
    else:
        state.choose_head(*event["head"])
        st.session_state[TURN] = st.session_state.get(TURN, 0) + 1
    session.touch()


def pinned(state: State, run: Run) -> list[tuple[int, int]]:
    """The pinned heads that the run has; edges are pins of other pages."""
    found = [hw.Head.parse(name) for name in state.pins if ">" not in name]
    return [(each.layer, each.head) for each in found if each.layer in run.layers and each.head < run.n_heads]


def draw_grid(state: State, run: Run, values: xr.DataArray, score: Score, change: bool) -> None:
    title = f"{score.label}, B − A" if change else score.label
    grid(
        values, key="heads_grid", title=title, unit=score.unit, limits=limits(values), chosen=(state.layer, state.head),
        pins=pinned(state, run), on_event=take,
    )  # fmt: skip
    page = lambda: head_grid(values, title, score.unit, limits(values), (state.layer, state.head))  # noqa: E731
    numbers("score-per-head", table(values, "score"), "heads-numbers", page)


def draw_scatter(
    state: State, run: Run, across: tuple[xr.DataArray, Score], up: tuple[xr.DataArray, Score], change: bool
) -> None:
    """Two scores as axes; a click chooses a head, a lasso or box pins those inside."""
    mark = ", B − A" if change else ""
    names = tuple(
        f"{score.label}{mark}{f' ({score.unit})' if score.unit else ''}" for _, score in (across, up)
    )
    figure = head_scatter(across[0], up[0], (names[0], names[1]), (state.layer, state.head), state.pins)
    key = f"heads-scatter-{st.session_state.get('heads-scatter-turn', 0)}"

    def picked() -> None:
        points = [point["customdata"] for point in st.session_state[key]["selection"]["points"]]
        st.session_state["heads-scatter-turn"] = st.session_state.get("heads-scatter-turn", 0) + 1
        if len(points) == 1:
            take({"head": (int(points[0][0]), int(points[0][1]))})
        for layer, head in points if len(points) > 1 else ():
            if f"{layer}.{head}" not in state.pins:
                take({"pin": (int(layer), int(head))})

    frame = table(up[0], "up").merge(table(across[0], "across"), on=["layer", "head"])
    st.plotly_chart(
        figure.update_layout(dragmode="lasso"), key=key, on_select=picked, selection_mode=("points", "lasso", "box"),
        config=CHART, alt=f"Heads by {names[0]} and {names[1]}; up, {extremes(frame, 'up')}",
    )  # fmt: skip
    numbers("two-scores-per-head", frame, "heads-numbers", figure)


def draw_mosaic(state: State, run: Run) -> None:
    # progress has a place of its own: a late look at a job would clear what stands in its place by then
    with st.container(key="heads-maps-work"):
        small = parts.maps(state, run)
    if small is not None:
        mosaic(
            small, run.layers, list(range(run.n_heads)), key="heads_mosaic", title="Maps of all heads",
            chosen=(state.layer, state.head), pins=pinned(state, run), on_event=take,
        )  # fmt: skip
        page = lambda: hw.figure(run.record, title="Maps of all heads")  # noqa: E731
        numbers("maps-of-all-heads", weights_in(small), "heads-mosaic-numbers", page)


def draw_table(state: State, frame: pd.DataFrame, offered: dict[str, Score]) -> None:
    """The ranked heads; a row is chosen by a click or by the keyboard."""
    name = f"{state.layer}.{state.head}"
    rows = np.flatnonzero(frame["head"].to_numpy() == name).tolist()
    order = crc32(" ".join(frame["head"]).encode())
    # a mark is of a row's place: the table begins anew where the order changes, or a head is chosen elsewhere
    key = f"heads-table-{st.session_state.get(TURN, 0)}-{order}"

    def picked() -> None:
        chosen = st.session_state[key]["selection"]["rows"]
        if chosen:
            head = hw.Head.parse(frame["head"].iloc[chosen[0]])
            session.current().choose_head(head.layer, head.head)
            session.touch()

    columns = {}
    for column in map(str, frame.columns):
        score, _, end = column.partition(" ")
        label = parts.BRIEF.get(score, {"sink": "share on sink"}.get(score, score)) + (
            f", {end}" if end else ""
        )
        if column in ("head", "role"):
            columns[column] = st.column_config.TextColumn(column, pinned=column == "head")
        else:
            about = offered.get(score)
            help = plain(f"{about.meaning}; {about.unit}") if about else None
            columns[column] = st.column_config.NumberColumn(label, format="%.3g", help=help)
    st.dataframe(
        frame, key=key, hide_index=True, height=430, column_config=columns, on_select=picked,
        selection_mode="single-row", selection_default={"selection": {"rows": rows}} if rows else None,
        alt=f"Heads by the size of their effect: {', '.join(frame['head'].iloc[:5])} first",
    )  # fmt: skip
    downloads("heads", frame, "heads-ranked")


def draw_actions(state: State, run: Run) -> None:
    """What can be done with the chosen head and with the pinned ones."""
    name = f"{state.layer}.{state.head}"
    pins = [f"{layer}.{head}" for layer, head in pinned(state, run)]
    with st.container(horizontal=True, vertical_alignment="center", key="heads-actions"):
        if st.button(
            f"Open head {name}", type="primary", icon=":material/center_focus_strong:", key="open-head"
        ):
            st.switch_page(pages.page("head"), query_params=to_address(state))
        if st.button(
            "Unpin it" if name in pins else f"Pin {name}", icon=":material/push_pin:", key="pin-head"
        ):
            state.pin(name)
            session.again()
        if st.button("Who reads this head", icon=":material/account_tree:", key="who-reads"):
            state.put("circuits.node", name)
            st.switch_page(pages.page("circuits"), query_params=to_address(state))
        st.markdown(
            plain(f"Pinned: {', '.join(pins)}" if pins else "No head is pinned: Shift-click pins one.")
        )
    if pins and not run.of_record:
        _draw_removal(state, run, pins)


def _draw_removal(state: State, run: Run, pins: list[str]) -> None:
    with st.container(horizontal=True, vertical_alignment="center", key="heads-removal"):
        if st.button("Ablate the pinned", icon=":material/block:", key="ablate-pinned"):
            _without(state, pins)
        rest = [f"{layer}.{head}" for layer in run.layers for head in range(run.n_heads)]
        rest = [name for name in rest if name not in pins]
        if st.button(
            "Keep only the pinned", icon=":material/filter_alt:", key="keep-pinned", disabled=not rest
        ):
            _without(state, rest)
        if st.button("Unpin all", key="unpin-all"):
            state.pins = [name for name in state.pins if name not in pins]
            session.again()


def _without(state: State, heads: Sequence[str]) -> None:
    """Run B without these heads, which the pages then show."""
    state.edits = [*state.edits, state.on_part(hw.AblateHeads(list(heads)).to_dict())]
    state.shown = "b"
    session.again()


def draw_curve(state: State, run: Run, over: str, label: str, unit: str) -> None:
    with st.container(key="heads-curve-work"):
        found = parts.curve(state, run, over)
    if found is None:
        return
    kept, whole = float(found["measure"][-1]), float(found["measure"][0])
    figure = pruning_figure(found, "The measure without its least helpful heads", unit)
    chart(
        figure, "heads-curve",
        f"{label} is {whole:.3g} with all heads and {kept:.3g} without any; "
        f"{found.sizes['control']} random orders as a band",
    )  # fmt: skip
    st.caption(
        plain(f"Heads are ranked one at a time by ablation. Not for: {parts.entry('prune_heads').not_for}.")
    )
    low, high = found["random"].min("control"), found["random"].max("control")
    frame = pd.DataFrame(
        {"removed": found["fraction"].values, "heads left": found["heads_left"].values,
         "measure": found["measure"].values, "random, lowest": low.values, "random, highest": high.values}
    )  # fmt: skip
    numbers("pruning-curve", frame, "heads-curve-numbers", figure)


def limits(values: xr.DataArray) -> tuple[float, float]:
    """Colours over what there is: about zero where numbers are negative, else from zero to the largest."""
    known = values.values[np.isfinite(values.values)]
    if not known.size:
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    return (-max(-low, high), max(-low, high)) if low < 0 else (0.0, high or 1.0)
