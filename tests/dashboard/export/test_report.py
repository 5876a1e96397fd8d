"""A view as one web page: its numbers, the maps of pinned heads, and nothing that a hostile word could run."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest
from opened_app import opened

from headwater.dashboard.export.report import report
from headwater.dashboard.running import measure, runs
from headwater.dashboard.state.state import State

TEXT = "When <s> Mary </s> $x$ gave </script><script>alert(1)</script> a drink to"
CUT = {
    "edit": "AblateHeads",
    "heads": ["0.1"],
    "ablation": "zero",
    "examples": None,
    "seed": 0,
    "layers": "all",
}

pytestmark = pytest.mark.usefixtures("offered")


def made(**more) -> tuple[str, State, measure.Measure]:
    state = State(model="small", text=TEXT, **more)
    chosen = measure.of(state, runs.a(state))
    return report(state, chosen, ["<b>heads off</b>"]), state, chosen


def test_a_report_says_the_measure_of_both_runs_and_the_likeliest_answers():
    page, state, chosen = made(edits=[CUT])
    for run in (runs.a(state), runs.b(state)):
        assert f"<td>{chosen.value(run):.6g} nats</td>" in page
    told = re.search(r"Likeliest.*?<td>A ([\d.]+)", page, re.DOTALL)
    assert told is not None
    assert float(told[1]) == pytest.approx(np.exp(chosen.plain.log_probabilities()).max(), abs=1e-4)


def test_a_report_holds_the_map_of_each_pinned_head_in_both_runs_and_plotly_once():
    page, *_ = made(edits=[CUT], pins=["1.2", "0.1>2.3"])
    assert page.count("Plotly.newPlot(") == 2
    assert page.count("Head 1.2, run ") == 2
    assert "Edge 0.1 → 2.3" in html.unescape(page)
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<script[^>]+src=", page)


def test_hostile_words_are_only_words():
    page, _, _ = made(edits=[CUT], pins=["1.2"])
    assert "<script>alert" not in page
    assert "<b>heads off" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_pages_offer_the_report_and_each_figure_as_a_page():
    saved, head = opened("experiments", model="small"), opened("head", model="small", pins="0.1")
    assert "Report" in [each.label for each in saved.get("download_button")]
    assert [each.label for each in head.get("download_button")].count("HTML") >= 1
