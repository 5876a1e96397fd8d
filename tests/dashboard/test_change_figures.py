"""Figures of what an edit changed."""

from __future__ import annotations

import re

import numpy as np
import pytest

from headwater.dashboard.charts.changes import control_band, dumbbells, loss_changes, sweep_curve
from headwater.dashboard.charts.chips import signed_chips

HOSTILE = ["<b>", '" onmouseover="x', "$x$", "\n"]


def test_the_axis_of_dumbbells_fits_small_numbers_and_tokens_are_escaped():
    a, b = np.array([0.004, 0.001, 0.0]), np.array([0.001, 0.003, 0.0])
    figure = dumbbells(HOSTILE[:3], a, b, "probability", "title")
    low, high = figure.layout.xaxis.range
    assert low < 0 < 0.004 < high < 0.005
    assert figure.layout.yaxis.ticktext[0] == "&lt;b&gt;"
    assert [list(trace.x) for trace in figure.data if trace.name in ("A", "B")] == [list(a), list(b)]
    same = dumbbells(["a"], np.array([0.5]), np.array([0.5]), "probability", "title")
    assert same.layout.xaxis.range[0] < 0.5 < same.layout.xaxis.range[1]


def test_chips_are_red_where_the_value_rose_and_hold_no_markup_of_tokens():
    text = signed_chips(np.array([0.5, -2.0, np.nan, 0.0]), HOSTILE, 2.0, ["up", "down", "<i>", "none"])
    grounds = re.findall(r"background:([^;]+);", text)
    assert grounds == [
        "rgba(209,60,61,0.212)",
        "rgba(33,113,181,0.850)",
        "transparent",
        "rgba(33,113,181,0.000)",
    ]
    assert set(re.findall(r"<(\w+)", text)) == {"div", "span"}
    assert text.count('="') == 1 + 2 * len(HOSTILE)
    assert "⏎" in text


def test_a_long_text_shows_its_losses_as_a_line():
    figure = loss_changes(np.zeros(3), np.array([np.nan, 1.0, -2.0]), ["a", "b", "c"], "title")
    np.testing.assert_array_equal(figure.data[0].y, [np.nan, 1.0, -2.0])


@pytest.mark.parametrize("wide", [0.0, 0.5])
def test_a_sweep_shows_its_interval_where_it_has_one(wide):
    mean = np.array([1.0, 2.0])
    figure = sweep_curve(
        np.array([0.0, 1.0]), mean, (mean - wide, mean + wide), 1.5, 0.4, "keep", "p", "title"
    )
    bands = [list(trace.y) for trace in figure.data if trace.fill == "toself"]
    assert bands == ([[1.5, 2.5, 1.5, 0.5]] if wide else [])
    assert list(figure.data[-1].y) == [1.0, 2.0]


def test_controls_that_did_not_run_are_left_out_of_the_band():
    values = np.array([np.nan, *np.linspace(0, 1, 21)])
    figure = control_band(values, 0.0, 3.0, "p", "title")
    band = figure.layout.shapes[0]
    assert (band.x0, band.x1) == pytest.approx((0.05, 0.95))
    assert len(figure.data[0].x) == 21
    assert not control_band(np.array([np.nan]), 0.0, 3.0, "p", "title").data
