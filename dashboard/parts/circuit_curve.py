"""How fast the best edges of a ranking regain what the model does, and the areas by which a benchmark judges it."""

from __future__ import annotations

from collections.abc import Hashable

import pandas as pd
import streamlit as st

from headwater.analyses._catalogue.catalogue import entry
from headwater.dashboard.charts.circuit import size_curve
from headwater.dashboard.parts.job import fitting
from headwater.dashboard.running import circuits
from headwater.dashboard.running.circuits import Circuit
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.pairs import Corrupt
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import bound
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import chart, numbers, plain

ASKED = "circuits.curve"
LINES = {"signed": "those that help most first", "absolute": "the largest first"}


def draw_curve(
    state: State, run: Run, chosen: Measure, found: Circuit, other: Corrupt, how: str, key: tuple[Hashable, ...]
) -> None:  # fmt: skip
    """The curve and its areas, where it is asked for; `key` names what they depend on beside the run of the curve."""
    asked = bound.toggle(
        state, ASKED, "Judge the whole ranking",
        help="CPR and CMD of the Mechanistic Interpretability Benchmark: about twenty circuits are run",
    )  # fmt: skip
    if not asked:
        return
    curve = fitting(
        ("curve", *key),
        lambda: circuits.curve(state, run, chosen, other.example, found, how),
        "curve of the ranking", model=run.name,
    )  # fmt: skip
    if curve is None:
        return
    areas = {name: float(curve[name].sel(bound="mean")) for name in ("cpr", "cmd")}
    left, right = st.columns(2)
    left.metric("CPR, larger is better", f"{areas['cpr']:.3f}")
    right.metric("CMD, smaller is better", f"{areas['cmd']:.3f}")
    parts = [100 * share for share in curve["share"].values.tolist()]
    lines = {told: curve["f"].sel(ranking=name, bound="mean").values for name, told in LINES.items()}
    figure = size_curve(
        parts, lines, None, "Share of the difference that the best edges regain", "% of the edges"
    )
    chart(figure, "circuit-curve", f"CPR {areas['cpr']:.3f}, CMD {areas['cmd']:.3f}")
    st.caption(plain(f"Of one pair, so without intervals. Not for: {entry('circuit_curve').not_for}."))
    counts = {f"edges, {told}": curve["edges"].sel(ranking=name).values for name, told in LINES.items()}
    numbers(
        "circuit-curve",
        pd.DataFrame({"% of the edges": parts, **lines, **counts}),
        "circuit-curve-numbers",
        figure,
    )
