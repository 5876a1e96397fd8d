"""What a circuit is judged by where it is asked for: how fast the best edges of its ranking regain what the model does,
with the areas of a benchmark, and how many of its edges are found again with other corrupt prompts.
"""

from __future__ import annotations

from collections.abc import Hashable

import pandas as pd
import streamlit as st

from headwater.analyses._catalogue.catalogue import entry
from headwater.dashboard.charts.circuit import size_curve
from headwater.dashboard.parts.job import fitting
from headwater.dashboard.running import circuits, pairs
from headwater.dashboard.running.circuits import Circuit
from headwater.dashboard.running.inputs import given
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.models import resident
from headwater.dashboard.running.pairs import Corrupt
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import bound
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import chart, numbers, plain

ASKED, AGAIN = "circuits.curve", "circuits.again"
MOST = 8  # other corrupt prompts
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


def draw_again(
    state: State, run: Run, chosen: Measure, found: Circuit, other: Corrupt, steps: int, size: int
) -> None:
    """The share in common, where it is asked for."""
    asked = bound.toggle(
        state, AGAIN, "Find it again with other corrupt prompts",
        help=f"up to {MOST} prompts as long; each takes as long as this circuit took",
    )  # fmt: skip
    if not asked:
        return
    texts = list(dict.fromkeys(text for text, _ in pairs.found(state, chosen) if text != other.key[0]))[:MOST]
    if not texts:
        st.info("No other corrupt prompt is known for this text, so there is nothing to find it again with.")
        return
    model = resident(state.model)

    def others() -> list[Circuit]:
        examples = [given(state, model, text).example for text in texts]
        return [circuits.of_edges(state, run, chosen, each, steps) for each in examples]

    key = ("again", *run.identity, *chosen.key, *texts, steps)
    kept = fitting(key, others, "circuits of other corrupt prompts", model=run.name)
    if kept is None:
        return
    told = circuits.again(found, kept, size)
    left, right = st.columns(2)
    left.metric(f"Edges shared with those of {told['stability_over']}", f"{told['stability']:.1%}")
    right.metric("By chance", f"{told['stability_by_chance']:.1%}")
    st.caption(plain(f"The mean share of the best {size} edges. The others: {'; '.join(texts)}"))
