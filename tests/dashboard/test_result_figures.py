"""Figures of results: what is drawn is what the array holds, and the subtitle says which part of it."""

from __future__ import annotations

import json

import networkx as nx
import numpy as np
import pytest
import xarray as xr

import headwater as hw
from headwater.dashboard.figures.graph import MOST_EDGES


def array(dims: str, *shape: int, seed: int = 0, **coords: object) -> xr.DataArray:
    values = np.random.default_rng(seed).random(shape)
    attrs = {"question": "Why?", "unit": "share"}
    return xr.DataArray(values, dims=dims.split(), coords=coords, name="found", attrs=attrs)


def subtitle(drawn) -> str:
    return (drawn.layout.title.subtitle.text or "").replace("<br>", " ")


def test_a_map_names_its_axes_by_the_coordinates() -> None:
    values = xr.DataArray(
        [[0.5, -1.0, 0.0], [1.0, 2.0, np.nan]],
        dims=("attribution", "other"),
        coords={"attribution": ["a", "b"], "other": ["x", "y", "y"]},
        attrs={"question": "who agrees?", "unit": "tau"},
    )
    drawn = hw.figure(values)
    shown = drawn.data[0]
    assert list(shown.y) == ["a", "b"]
    assert list(shown.x) == ["x", "y (1)", "y (2)"]
    np.testing.assert_array_equal(np.array(shown.z, dtype=float), values.values)
    assert (shown.zmin, shown.zmax) == (-2.0, 2.0)
    assert drawn.layout.title.text == "who agrees?"
    assert drawn.layout.xaxis.title.text == "other"
    assert shown.colorbar.title.text == "tau"
    assert "1 undefined" in subtitle(drawn)


def test_running_numbers_are_curves_and_one_dimension_bars() -> None:
    curve = xr.DataArray(
        [[1.0, 0.5], [0.2, 0.1]],
        dims=("attribution", "fraction"),
        coords={"attribution": ["a", "b"], "fraction": [0.1, 0.9]},
    )
    lines = hw.figure(curve).data
    assert [line.name for line in lines] == ["attribution a", "attribution b"]
    assert list(lines[1].x) == [0.1, 0.9]
    assert list(lines[1].y) == [0.2, 0.1]
    bars = hw.figure(curve.isel(fraction=0, drop=True)).data[0]
    assert bars.type == "bar"
    assert list(bars.x) == ["a", "b"]
    assert list(bars.y) == [1.0, 0.2]
    assert list(hw.figure(curve.isel(attribution=0, drop=True)).data[0].y) == [1.0, 0.5]


def test_a_share_that_is_kept_is_a_curve_and_a_part_that_is_kept_is_none() -> None:
    lines = hw.figure(array("by kept", 2, 3, by=["observed", "recent"], kept=[0.1, 0.25, 0.5])).data
    assert [(line.type, line.mode[:5], list(line.x)) for line in lines] == 2 * [
        ("scatter", "lines", [0.1, 0.25, 0.5])
    ]
    parts = hw.figure(array("kept pair", 2, 3, kept=["circuit", "complement"])).data
    assert [each.type for each in parts] == ["heatmap"]


def test_layers_of_a_hybrid_are_neighbours_on_every_figure() -> None:
    grid = hw.figure(array("layer head", 2, 3, layer=[1, 3]))
    assert (grid.layout.yaxis.type, list(grid.data[0].y)) == ("category", [1, 3])
    curve = hw.figure(array("layer", 2, layer=[1, 3]))
    assert (curve.layout.xaxis.type, list(curve.data[0].x)) == ("category", ["1", "3"])


def test_a_short_axis_becomes_panels_on_one_colour_scale() -> None:
    values = array("measure layer head", 2, 3, 4, measure=["logit", "z"])
    values[1] *= 5
    drawn = hw.figure(values)
    assert [note.text for note in drawn.layout.annotations] == ["measure logit", "measure z"]
    for place, trace in enumerate(drawn.data):
        np.testing.assert_array_equal(trace.z, values.values[place])
    assert len({(trace.zmin, trace.zmax) for trace in drawn.data}) == 1
    assert [trace.showscale is not False for trace in drawn.data] == [True, False]
    assert (drawn.data[1].xaxis, drawn.layout.xaxis2.domain[0] > drawn.layout.xaxis.domain[1]) == ("x2", True)


def test_a_long_axis_is_gone_through_by_a_menu_that_says_where_it_is() -> None:
    values = array("batch key", 3, 2)
    values = values.assign_coords(key_token=(("batch", "key"), [["a", "b"], ["c", "d"], ["e", "f"]]))
    drawn = hw.figure(values)
    assert subtitle(drawn).startswith("batch 0")
    assert [trace.visible for trace in drawn.data] == [True, False, False]
    entries = drawn.layout.updatemenus[0].buttons
    assert [entry.label for entry in entries] == ["batch 0", "batch 1", "batch 2"]
    assert list(entries[2].args[0]["visible"]) == [False, False, True]
    assert entries[2].args[1]["title.subtitle.text"] == "batch 2"
    assert list(drawn.data[2].x) == ["0 e", "1 f"]
    np.testing.assert_array_equal(drawn.data[2].y, values.values[2])
    many = hw.figure(array("layer head key", 2, 3, 40))
    assert len(many.layout.sliders[0].steps) == 40
    np.testing.assert_array_equal(many.data[7].z.shape, (2, 3))


def test_too_many_slices_leave_some_axes_at_their_first_value_and_say_so() -> None:
    drawn = hw.figure(array("batch layer head key", 30, 2, 3, 40))
    assert len(drawn.data) == 40
    assert "batch 0 of 30 (choose with batch=…)" in subtitle(drawn)
    assert "batch" not in subtitle(hw.figure(array("layer head key", 2, 3, 40)))


def test_one_value_of_an_axis_can_be_chosen_and_is_told() -> None:
    roles = array("layer head role", 2, 3, 9, role=list("abcdefghi"))
    drawn = hw.figure(roles, role="c")
    np.testing.assert_array_equal(drawn.data[0].z, roles.values[:, :, 2])
    assert "role c" in subtitle(drawn)
    assert "layer 1" in subtitle(hw.figure(roles, role="c", layer=1))
    assert [note.text for note in hw.figure(roles, role=["d", "b"]).layout.annotations] == [
        "role d",
        "role b",
    ]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"rôle": 1}, "no axis 'rôle'"),
        ({"role": "z"}, "role has no 'z'; role: a, b"),
        ({"layer": 7}, "layer has no '7'"),
        ({"tokens": "abc"}, "tokens is a list"),
        ({"tokens": 3}, "tokens is a list with one text per token; got 3"),
        ({"tokens": ["a", "b"]}, "tokens= holds 2 texts; the result has no axis of tokens"),
        ({"image": "cat.png"}, "image= takes a picture"),
    ],
)
def test_what_is_not_there_is_one_line(chosen, words) -> None:
    with pytest.raises(hw.HeadwaterError, match=words) as caught:
        hw.figure(array("layer head role", 2, 3, 2, role=["a", "b"]), **chosen)
    assert "\n" not in str(caught.value)


def test_tokens_given_name_the_places_and_equal_tokens_stay_apart() -> None:
    drawn = hw.figure(array("query key", 3, 3), tokens=["the", "<b>", "the"])
    assert list(drawn.data[0].x) == list(drawn.data[0].y) == ["0 the", "1 &lt;b&gt;", "2 the"]


def test_an_interval_becomes_whiskers() -> None:
    mean = array("component", 3, component=["a", "b", "c"])
    data = xr.Dataset(
        {"raw": array("batch component", 2, 3), "mean": mean, "low": mean - 0.1, "high": mean + 0.3}
    )
    drawn = hw.figure(data)
    first = drawn.data[0]
    np.testing.assert_allclose(first.error_y.array, 0.3)
    np.testing.assert_allclose(first.error_y.arrayminus, 0.1)
    assert [entry.label for entry in drawn.layout.updatemenus[0].buttons] == ["mean", "raw"]
    assert "whiskers from low to high" in subtitle(drawn)
    bound = xr.concat([mean - 0.1, mean, mean + 0.3], "bound").assign_coords(bound=["low", "mean", "high"])
    np.testing.assert_allclose(hw.figure(bound).data[0].error_y.array, 0.3)


def test_an_estimate_that_is_chosen_keeps_its_interval() -> None:
    """Seen to fail with the array alone; a list keeps several arrays."""
    numbers = {name: ("size", np.array([2.0, 3.0]) + place) for name, place in [("low", -1), ("high", 2)]}
    data = xr.Dataset({"mean": ("size", [2.0, 3.0]), **numbers, "other": ("size", [0.0, 1.0])})
    drawn = hw.figure(data, variable="mean")
    assert len(drawn.data) == 1
    np.testing.assert_array_equal(drawn.data[0].error_y.array, [2.0, 2.0])
    np.testing.assert_array_equal(drawn.data[0].error_y.arrayminus, [1.0, 1.0])
    assert hw.figure(data, variable="other").data[0].error_y.array is None
    assert len(hw.figure(data, variable=["mean", "other"]).data) == 2
    with pytest.raises(hw.HeadwaterError, match="the result has no 'means': did you mean 'mean'"):
        hw.figure(data, variable=["means"])


def test_a_dataset_keeps_every_array_words_and_single_numbers() -> None:
    data = xr.Dataset(
        {
            "rate": 0.25,
            "share": array("layer head", 2, 2),
            "order": ("rank", ["0.1", "1.1"]),
            "far": ("rank", [1.0, 2.0]),
        },
        attrs={"unit": "fraction"},
    )
    drawn = hw.figure(data)
    assert [entry.label for entry in drawn.layout.updatemenus[0].buttons] == [
        "share",
        "rank",
        "single numbers",
    ]
    tables = [trace for trace in drawn.data if trace.type == "table"]
    assert [list(map(list, table.cells["values"])) for table in tables] == [
        [["0.1", "1.1"], ["1", "2"]],
        [["rate"], ["0.25"]],
    ]
    np.testing.assert_array_equal(hw.figure(data, variable="share").data[0].z, data.share.values)


@pytest.mark.parametrize("fill", [np.nan, np.inf, 0.0, -1.0, 1e300])
def test_strange_numbers_are_drawn_or_said(fill) -> None:
    for dims, shape in (
        ("layer head", (2, 3)),
        ("query key", (2, 2)),
        ("key", (3,)),
        ("a b", (2, 2)),
        ("fraction", (4,)),
    ):
        values = array(dims, *shape)
        values[...] = fill
        drawn = hw.figure(values)
        told = json.loads(drawn.to_json())
        assert told["layout"]["title"]["text"] == "Why?"
        if not np.isfinite(fill):
            assert "no number here is defined" in drawn.data[0].text[0]
    mixed = array("key", 3)
    mixed[1] = -np.inf
    assert "1 infinite, left empty" in subtitle(hw.figure(mixed))


@pytest.mark.parametrize(
    "values",
    [
        xr.DataArray(True),
        xr.DataArray([[True, False]], dims=("layer", "head")),
        xr.DataArray([["a", "b"], ["c", "a"]], dims=("batch", "layer")),
        xr.DataArray(["x", "y"], dims=("rank",)),
        xr.DataArray(2.5, name="rate"),
        xr.DataArray(np.zeros((0, 3)), dims=("found", "head")),
        xr.DataArray(np.arange(3), dims=("key",)),
        xr.DataArray(np.array(["a", "b"], dtype=object), dims=("batch",)),
    ],
)
def test_flags_words_single_numbers_and_nothing_have_a_figure(values) -> None:
    drawn = hw.figure(values, title="T")
    assert len(drawn.data) == 1
    assert drawn.layout.title.text == "T"
    json.loads(drawn.to_json())


def test_what_can_not_be_drawn_is_said() -> None:
    with pytest.raises(hw.HeadwaterError, match="is complex128; a figure draws real numbers"):
        hw.figure(xr.DataArray(np.zeros(2, dtype=complex), dims="key"))
    with pytest.raises(hw.HeadwaterError, match="too large to draw"):
        hw.figure(xr.DataArray(np.zeros((5000, 2)), dims=("edge", "pair")))
    with pytest.raises(hw.HeadwaterError, match="ndarray has no named axes"):
        hw.figure(np.zeros((2, 2)))
    with pytest.raises(hw.HeadwaterError, match="got a str"):
        hw.figure("rollout")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([array("key", 3), array("key", 4)], r"a list of 2: hw.figure\(results\[0\]\) draws the first"),
        ({"a": array("key", 3), "b": array("key", 4)}, "not have the same axes.*draw them one by one"),
        (array("key", 3).to_dataframe(), r"table.to_xarray\(\)"),
        (hw.load("tasks-4l"), r"hw.figure\(model.record\(text\)\)"),
    ],
)
def test_what_is_not_one_result_is_told_how_to_become_one(given, words) -> None:
    with pytest.raises(hw.HeadwaterError, match=words) as caught:
        hw.figure(given)
    assert "\n" not in str(caught.value)


def test_an_array_that_can_not_be_drawn_leaves_the_others() -> None:
    data = xr.Dataset({"no": ("key", np.zeros(3, dtype=complex)), "yes": ("key", [1.0, 2.0, 3.0])})
    drawn = hw.figure(data)
    assert list(drawn.data[0].y) == [1.0, 2.0, 3.0]
    assert [entry.label for entry in drawn.layout.updatemenus[0].buttons] == ["yes", "no"]
    assert "no is complex128" in drawn.data[1].text[0]
    with pytest.raises(hw.HeadwaterError, match="no is complex128"):
        hw.figure(data, variable="no")


def test_a_large_map_is_pooled_and_says_so() -> None:
    values = xr.DataArray(np.eye(1030, k=-1), dims=("query", "key"))
    drawn = hw.figure(values)
    assert drawn.data[0].z.shape == (344, 344)
    assert np.diag(drawn.data[0].z)[:-1].min() == 1.0
    assert "largest of 3 × 3" in subtitle(drawn)
    assert drawn.data[0].x[1] == "3"


def test_edges_may_hold_any_number_or_none() -> None:
    """Seen to fail with numpy's numbers taken for none, and with an undefined number as a width."""
    graph = nx.DiGraph()
    graph.add_edge("0.1", "1.2", score=np.float32(-3.0))
    graph.add_edge("0.2", "1.2", score=float("nan"))
    graph.add_edge("0.3", "1.2", score=1.5)
    drawn = hw.figure(graph, title="<a & b>")
    assert [line.text.split("<br>")[1] for line in drawn.data[:-1]] == ["score 1.5", "score -3"]
    assert subtitle(drawn) == "by |score| · 1 edges have no finite score · red is negative"
    assert drawn.layout.title.text == "&lt;a &amp; b&gt;"
    bare = hw.figure(nx.path_graph(3))
    assert subtitle(bare) == "the edges carry no number"
    only = nx.Graph([("0.1", "1.2", {"score": np.inf})])
    assert "no finite score" in hw.figure(only).data[0].text[0]
    with pytest.raises(hw.HeadwaterError, match="neither tokens= nor image="):
        hw.figure(graph, tokens=["a"])


def test_a_graph_goes_from_low_layers_to_high_ones_with_its_strongest_edges() -> None:
    graph = nx.DiGraph(question="what talks to what?")
    assert "no edges" in hw.figure(graph).data[0].text[0]
    graph.add_edge("embed", "0.1.q", score=2.0)
    graph.add_edge("0.1", "mlp.0", score=-1.0)
    graph.add_edge("mlp.0", "1.2.k", score=0.5)
    graph.add_edge("1.2", "logits", score=4.0)
    drawn = hw.figure(graph)
    nodes = drawn.data[-1]
    across = dict(zip(nodes.customdata, nodes.x, strict=True))
    order = ["embed", "0.1.q", "mlp.0", "1.2.k", "logits"]
    assert sorted(order, key=across.__getitem__) == order
    widths = {line.text.split("<br>")[0]: line.line.width for line in drawn.data[:-1]}
    assert max(widths, key=widths.__getitem__) == "1.2 → logits"
    colours = {line.text.split("<br>")[0]: line.line.color for line in drawn.data[:-1]}
    assert colours["0.1 → mlp.0"] != colours["embed → 0.1.q"]
    assert len({(x, y) for x, y in zip(nodes.x, nodes.y, strict=True)}) == len(nodes.x)
    for i in range(MOST_EDGES):
        graph.add_edge(f"{i}.0", f"{i + 1}.0", weight=1.0, score=0.01)
    many = hw.figure(graph)
    assert len(many.data) == MOST_EDGES + 1
    assert any("1.2 → logits" in line.text for line in many.data[:-1])
    assert "200 strongest of 204" in many.layout.title.subtitle.text
