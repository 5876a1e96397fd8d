"""Figures: what is drawn is what was given, whatever the tokens contain and however large the map is."""

from __future__ import annotations

import json

import networkx as nx
import numpy as np
import plotly.io as pio
import pytest
import xarray as xr

import headwater as hw
from headwater.dashboard.figures.heads import head_grid
from headwater.dashboard.figures.labels import ticks, token_label, visible
from headwater.dashboard.figures.pattern import pattern_map
from headwater.dashboard.figures.pooling import pool, pool_blocks
from headwater.dashboard.figures.style import GREY, INK
from headwater.dashboard.figures.tokens import token_bars, token_strip

HOSTILE = [
    "<s>",
    "</s>",
    "&lt;",
    "$x$",
    "the",
    "the",
    "a\nb",
    "<a href='x'>",
    "=1+1",
    "\ud800",
    "\u202e",
    "",
    "\x00",
]


def attention(length: int, seed: int = 0) -> np.ndarray:
    """A causal map whose rows sum to 1."""
    weights = np.tril(np.random.default_rng(seed).exponential(size=(length, length)))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def previous_token_map(length: int) -> np.ndarray:
    weights = np.eye(length, k=-1, dtype=np.float32)
    weights[0, 0] = 1
    return weights


def grid(layers: int = 4, heads: int = 8) -> xr.DataArray:
    values = np.arange(layers * heads, dtype=np.float64).reshape(layers, heads) / 100
    return xr.DataArray(values, dims=("layer", "head"), coords={"layer": range(layers), "head": range(heads)})


@pytest.mark.parametrize(
    ("token", "label"),
    [
        ("<s>", "0 &lt;s&gt;"),
        ("</s>", "0 &lt;/s&gt;"),
        ("&lt;", "0 &amp;lt;"),
        ("$x$", "0 &#36;x&#36;"),
        ("a\nb", "0 a⏎b"),
        (" the", "0 ·the"),
        ("", "0 ∅"),
        ("\x00", "0 ␀"),
        ("\u202e", "0 ‹202E›"),
        ("\ud800", "0 �"),
    ],
)
def test_labels_show_hostile_tokens(token, label):
    assert token_label(token, 0) == label


def test_labels_of_equal_tokens_differ_and_long_tokens_are_cut():
    labels = [token_label(token, place) for place, token in enumerate(["the", "the", "x" * 1_000_000])]
    assert labels[0] != labels[1]
    assert len(labels[2]) < 20


def test_visible_leaves_words_alone():
    assert visible("naïve") == "naïve"
    assert visible("👩\u200d🔬") == "👩\u200d🔬"


def test_ticks_are_thinned_but_name_true_positions():
    places, text = ticks([str(n) for n in range(200)], np.arange(200) + 7, most=50)
    assert len(places) == 50
    assert text[1] == "11 4"


@pytest.mark.parametrize("seed", range(5))
def test_pool_takes_the_largest_weight_of_each_block_and_knows_where(seed):
    weights = np.random.default_rng(seed).normal(size=(23, 17)).astype(np.float32)
    for signed in (False, True):
        pooled = pool(weights, most=6, signed=signed)
        assert pooled.block == 4
        for row, column in np.ndindex(pooled.cells.shape):
            block = weights[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            expected = block.flat[np.abs(block).argmax()] if signed else block.max()
            assert pooled.cells[row, column] == expected
            assert weights[pooled.query[row, column], pooled.key[row, column]] == expected


def test_pool_of_row_blocks_equals_pool_of_the_whole():
    weights = attention(100)
    blocks = [
        (slice(start, min(start + 13, 100)), weights[start : start + 13]) for start in range(0, 100, 13)
    ]
    whole, parts = pool(weights, 32), pool_blocks(blocks, (100, 100), 32)
    np.testing.assert_array_equal(whole.cells, parts.cells)
    np.testing.assert_array_equal(whole.query, parts.query)


def test_pooling_keeps_a_previous_token_head_at_full_strength():
    assert np.nanmax(pool(previous_token_map(2048), 512).cells[100]) == 1.0


def test_small_map_is_exact_and_unpooled():
    weights = attention(12)
    drawn = pattern_map(weights, ["t"] * 12, ["t"] * 12, "map")
    np.testing.assert_array_equal(drawn.data[0].z, weights)
    assert "largest" not in drawn.layout.title.subtitle.text
    assert "0 to 1" in drawn.layout.title.subtitle.text
    assert (drawn.data[0].zmin, drawn.data[0].zmax) == (0, 1)


def test_pooled_map_says_so_and_its_margins_come_from_unpooled_weights():
    weights = attention(64)
    drawn = pattern_map(weights, ["t"] * 64, ["t"] * 64, "map", most=16)
    heat, received, entropy = drawn.data
    assert heat.z.shape == (16, 16)
    assert "largest weight of 4 × 4" in drawn.layout.title.subtitle.text
    seen = np.arange(64, 0, -1)
    np.testing.assert_allclose(received.y, weights.sum(0) / seen, rtol=1e-5)
    logs = np.log(np.where(weights > 0, weights, 1))
    np.testing.assert_allclose(entropy.x, -(weights * logs).sum(1), rtol=1e-4, atol=1e-6)
    assert received.x[0] == pytest.approx(-0.375)  # the first of four keys in cell 0, left of its middle
    assert heat.customdata.shape == (16, 16, 2)


def test_given_margins_are_drawn_as_given():
    drawn = pattern_map(
        attention(5), ["t"] * 5, ["t"] * 5, "map", received=np.arange(5.0), entropy=np.arange(5.0) + 1
    )
    np.testing.assert_array_equal(drawn.data[1].y, np.arange(5))
    np.testing.assert_array_equal(drawn.data[2].x, np.arange(5) + 1)


def test_entropy_is_drawn_on_the_scale_of_an_even_spread():
    drawn = pattern_map(previous_token_map(8), ["t"] * 8, ["t"] * 8, "map")
    assert drawn.layout.xaxis4.range == (0, pytest.approx(np.log(8)))


def test_margin_of_a_bidirectional_map_counts_every_query():
    weights = np.full((4, 4), 0.25, dtype=np.float32)
    drawn = pattern_map(weights, ["t"] * 4, ["t"] * 4, "map")
    np.testing.assert_allclose(drawn.data[1].y, 0.25)


def test_leaving_out_position_zero_changes_the_scale_and_no_number():
    weights = attention(10)
    weights[5] = [0.9, 0.02, 0.02, 0.02, 0.02, 0.02, 0, 0, 0, 0]
    plain, without = (
        pattern_map(weights, ["t"] * 10, ["t"] * 10, "m", exclude_first=flag) for flag in (False, True)
    )
    np.testing.assert_array_equal(plain.data[0].z, without.data[0].z)
    assert without.data[0].zmax == pytest.approx(weights[:, 1:].max())
    assert "without position 0" in without.layout.title.subtitle.text


def test_a_window_names_true_positions():
    drawn = pattern_map(attention(6), ["q"] * 6, ["k"] * 6, "m", first_query=20, first_key=10)
    assert drawn.layout.yaxis3.ticktext[0] == "20 q"
    assert drawn.layout.xaxis3.ticktext[5] == "15 k"


def test_hostile_tokens_keep_one_row_and_column_each():
    count = len(HOSTILE)
    drawn = pattern_map(attention(count), HOSTILE, HOSTILE, "map")
    assert drawn.data[0].z.shape == (count, count)
    assert drawn.data[0].x is None  # an integer axis: equal names can not melt
    assert len(set(drawn.layout.xaxis3.ticktext)) == count
    assert not any("<" in label for label in drawn.layout.xaxis3.ticktext)
    json.dumps(json.loads(pio.to_json(drawn))).encode("utf-8")


def test_head_grid_has_a_point_to_click_for_every_head():
    values = grid()
    values[1, 2] = np.nan
    drawn = head_grid(values, "Entropy", "nats", (0, 2), chosen=(3, 1))
    heat, points = drawn.data
    assert (heat.type, points.type) == ("heatmap", "scatter")
    assert heat.z.shape == (4, 8)
    assert (heat.zmin, heat.zmax) == (0, 2)
    assert heat.hoverinfo == "skip"
    assert drawn.layout.hoverdistance == -1
    assert list(zip(points.y, points.x, strict=True)) == [
        (layer, head) for layer in range(4) for head in range(8)
    ]
    assert points.customdata[10] == "no value"
    assert points.customdata[11] == "0.11"
    assert heat.colorbar.title.text == "nats"
    outline = drawn.layout.shapes[0]
    assert (outline.x0, outline.y0) == (0.5, 2.5)


def test_head_grid_of_some_layers_reports_their_true_numbers():
    values = grid().sel(layer=[2, 3])
    assert set(head_grid(values, "x").data[1].y) == {2, 3}


def test_layers_of_a_hybrid_stand_in_a_row_and_report_their_numbers():
    drawn = head_grid(grid().sel(layer=[1, 3]), "x", chosen=(3, 2))
    assert drawn.layout.yaxis.type == "category"  # a number axis would leave room for layers 0, 2 and 4
    assert list(drawn.data[0].y) == [1, 3]
    assert set(drawn.data[1].y) == {1, 3}
    outline = drawn.layout.shapes[0]
    assert (outline.x0, outline.y0) == (1.5, 0.5)  # head 2 in the second row
    assert not head_grid(grid().sel(layer=[1, 3]), "x", chosen=(0, 2)).layout.shapes


def test_grid_of_signed_values_is_symmetric_about_zero():
    drawn = head_grid(grid() - 0.1, "change")
    assert drawn.data[0].zmax == -drawn.data[0].zmin == pytest.approx(0.21)


def test_strip_reports_positions_and_leaves_no_token_out():
    values = np.linspace(0, 1, 30)
    drawn = token_strip(values, [f"t{n}" for n in range(30)], "strip", "share", chosen=13)
    assert list(drawn.data[1].customdata) == list(range(30))
    assert drawn.data[0].z.shape == (3, 12)
    assert drawn.data[0].z[1, 1] == np.float32(values[13])
    assert np.isnan(drawn.data[0].z[2, 6:]).all()
    assert drawn.layout.shapes[0].x0 == pytest.approx(0.51)


def test_strip_and_bars_escape_tokens():
    count = len(HOSTILE)
    strip = token_strip(np.zeros(count), HOSTILE, "strip")
    bars = token_bars(np.zeros(count), HOSTILE, "bars", "share")
    assert not any("<" in text for text in strip.data[1].text)
    assert not any("<s" in text or "<a" in text for text in strip.data[1].hovertext)
    assert bars.layout.xaxis.ticktext[0] == "0 &lt;s&gt;"
    assert len(bars.data[0].x) == count


def test_bars_have_one_for_each_token_at_its_place():
    drawn = token_bars(np.array([0.5, 0.0, 0.25]), ["<s>", "b", "b"], "bars", "share")
    assert list(drawn.data[0].x) == [0, 1, 2]
    assert list(drawn.data[0].y) == [0.5, 0, 0.25]
    assert drawn.layout.xaxis.ticktext[0] == "0 &lt;s&gt;"


def test_numbers_travel_as_typed_arrays():
    sent = json.loads(pio.to_json(pattern_map(attention(8), ["t"] * 8, ["t"] * 8, "m")))
    assert sent["data"][0]["z"]["dtype"] == "f4"


@pytest.mark.parametrize(
    "figure",
    [
        pytest.param(lambda: head_grid(grid(), "Induction", "nats", chosen=(1, 2)), id="heads"),
        pytest.param(lambda: token_bars(np.ones(3), list("abc"), "Share", "share"), id="bars"),
        pytest.param(lambda: hw.figure(grid().expand_dims(role=["a", "b"])), id="panels"),
        pytest.param(lambda: hw.figure(nx.DiGraph([("0.0", "1.0", {"score": 1.0})])), id="graph"),
    ],
)
def test_letters_take_the_colour_of_the_page(figure):
    """No letters of the layout have a fixed ink: it would vanish on a light or on a dark ground."""
    layout = figure().to_plotly_json()["layout"]
    layout.pop("template", None)
    assert INK not in json.dumps(layout)
    assert layout["font"] == {"size": 12}


def test_letters_on_a_clear_cell_do_not_take_the_ink_of_a_coloured_one():
    inks = token_strip(np.array([0.0, np.nan, 1.0]), ["a", "b", "c"], "Received").data[1].textfont.color
    assert inks == (INK, GREY, "#fff")
