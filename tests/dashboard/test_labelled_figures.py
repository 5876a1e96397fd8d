"""Figures of results that are neither heads × layers nor tokens, and of graphs.

Mutations seen to fail: axes exchanged, the colour scale of signed numbers not about zero, the weakest edges kept.
"""

from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import xarray as xr

from headwater.dashboard.figures.choose import figure
from headwater.dashboard.figures.graph import MOST_EDGES, circuit_graph


def test_a_map_names_its_axes_by_the_coordinates() -> None:
    values = xr.DataArray(
        [[0.5, -1.0, 0.0], [1.0, 2.0, np.nan]],
        dims=("attribution", "other"),
        coords={"attribution": ["a", "b"], "other": ["x", "y", "y"]},
        attrs={"question": "who agrees?", "unit": "tau"},
    )
    drawn = figure(values)
    shown = drawn.data[0]
    assert list(shown.y) == ["a", "b"]
    assert list(shown.x) == ["x", "y (1)", "y (2)"]
    np.testing.assert_array_equal(np.array(shown.z, dtype=float), values.values)
    assert (shown.zmin, shown.zmax) == (-2.0, 2.0)
    assert drawn.layout.title.text == "who agrees?"
    assert drawn.layout.xaxis.title.text == "other"


def test_running_numbers_are_curves_and_one_dimension_bars() -> None:
    curve = xr.DataArray(
        [[1.0, 0.5], [0.2, 0.1]],
        dims=("attribution", "fraction"),
        coords={"attribution": ["a", "b"], "fraction": [0.1, 0.9]},
    )
    lines = figure(curve).data
    assert [line.name for line in lines] == ["a", "b"]
    assert list(lines[1].x) == [0.1, 0.9]
    assert list(lines[1].y) == [0.2, 0.1]
    bars = figure(curve.isel(fraction=0, drop=True)).data[0]
    assert bars.type == "bar"
    assert list(bars.x) == ["a", "b"]
    assert list(bars.y) == [1.0, 0.2]
    assert list(figure(curve.isel(attribution=0, drop=True)).data[0].y) == [1.0, 0.5]


def test_what_can_not_be_drawn_is_said() -> None:
    with pytest.raises(ValueError, match="along one or two: select one value"):
        figure(xr.DataArray(np.zeros((2, 2, 2)), dims=("a", "b", "c")))
    with pytest.raises(ValueError, match="401 values along 'a' are too many"):
        figure(xr.DataArray(np.zeros((401, 2)), dims=("a", "b")))
    with pytest.raises(ValueError, match="no edges"):
        circuit_graph(nx.DiGraph(), "empty")


def test_a_graph_goes_from_low_layers_to_high_ones_with_its_strongest_edges() -> None:
    graph = nx.DiGraph(question="what talks to what?")
    graph.add_edge("embed", "0.1.q", score=2.0)
    graph.add_edge("0.1", "mlp.0", score=-1.0)
    graph.add_edge("mlp.0", "1.2.k", score=0.5)
    graph.add_edge("1.2", "logits", score=4.0)
    drawn = circuit_graph(graph, "circuit")
    nodes = drawn.data[-1]
    across = dict(zip(nodes.text, nodes.x, strict=True))
    order = ["embed", "0.1.q", "mlp.0", "1.2.k", "logits"]
    assert sorted(order, key=across.__getitem__) == order
    widths = {line.text.split("<br>")[0]: line.line.width for line in drawn.data[:-1]}
    assert max(widths, key=widths.__getitem__) == "1.2 → logits"
    colours = {line.text.split("<br>")[0]: line.line.color for line in drawn.data[:-1]}
    assert colours["0.1 → mlp.0"] != colours["embed → 0.1.q"]
    assert len({(x, y) for x, y in zip(nodes.x, nodes.y, strict=True)}) == len(nodes.x)
    for i in range(MOST_EDGES):
        graph.add_edge(f"{i}.0", f"{i + 1}.0", weight=1.0, score=0.01)
    many = circuit_graph(graph, "circuit")
    assert len(many.data) == MOST_EDGES + 1
    assert any("1.2 → logits" in line.text for line in many.data[:-1])
    assert "400 strongest of 404" in many.layout.title.subtitle.text
