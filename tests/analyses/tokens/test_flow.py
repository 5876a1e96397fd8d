"""Flow against networkx on the eager float64 maps, and the facts any flow must meet.

Mutation of the graph seen to fail: edges that lead to the row's own token.
"""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import numpy as np
import pytest
import torch
from limits import lower

import headwater as hw
from headwater.analyses.tokens.flow import flow, flow_graph
from headwater.analyses.tokens.rollout import rollout
from headwater.lens.errors import AnalysisError


def by_networkx(layers: np.ndarray, weight: float, start: int) -> np.ndarray:
    """Maximum flow from (L, start) to every (0, j) by preflow-push on the float capacities [layer, query, key]."""
    n = layers.shape[-1]
    graph = nx.DiGraph()
    for depth, layer in enumerate(layers, 1):
        mixed = (1 - weight) * layer + weight * np.eye(n)
        mixed = mixed / mixed.sum(-1, keepdims=True)
        for i, j in zip(*np.nonzero(mixed), strict=True):
            graph.add_edge((depth, i), (depth - 1, j), capacity=mixed[i, j])
    graph.add_nodes_from((0, j) for j in range(n))
    solver = nx.algorithms.flow.preflow_push
    top = (len(layers), start)
    return np.array([nx.maximum_flow_value(graph, top, (0, j), flow_func=solver) for j in range(n)])


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_matches_networkx(pair, batch, heads: str) -> None:
    ids, mask = batch[0][1:], batch[1][1:]
    maps = pair.maps(ids, mask).numpy()
    merged = maps.mean(2) if heads == "mean" else maps.max(2)
    record = pair.model.record(ids, attention_mask=mask)
    found = flow(record, queries=[-1, 1], residual=0.3, heads=heads, normalise=False)
    for row, real in enumerate(mask.bool().numpy()):
        place = np.flatnonzero(real)
        for asked, start in ((0, len(place) - 1), (1, 1)):
            expected = by_networkx(merged[:, row][:, place[:, None], place], 0.3, start)
            np.testing.assert_allclose(found.values[row, asked, place], expected, atol=2e-6)
            assert found.values[row, asked].sum() == pytest.approx(expected.sum(), abs=1e-5)


def test_one_layer_is_rollout(pair) -> None:
    record = pair.model.record(torch.randint(3, 61, (2, 8), generator=torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(
        flow(record, queries="all", last_layer=0), rollout(record, queries="all", last_layer=0), atol=2e-6
    )


def test_bounds_and_normalisation(causal_pair) -> None:
    ids = torch.randint(3, 61, (1, 10), generator=torch.Generator().manual_seed(1))
    record = causal_pair.model.record(ids)
    plain = flow(record, normalise=False).values[0, 0]
    first = causal_pair.maps(ids)[0].mean(1)[0].numpy()
    entering = (0.5 * first + 0.5 * np.eye(10)) / (0.5 * first.sum(-1, keepdims=True) + 0.5)
    assert (plain <= 1 + 1e-9).all()
    assert (plain <= entering.sum(0) + 1e-6).all()
    found = flow(record)
    np.testing.assert_allclose(found.values[0, 0], plain / plain.sum())
    assert found.attrs["question"]


def test_pure_sink(pure_sink: hw.HookedModel) -> None:
    """All of it can reach token 0; one path of half-full edges leads to the position itself."""
    record = pure_sink.record(torch.randint(3, 61, (1, 6), generator=torch.Generator().manual_seed(0)))
    found = flow(record, normalise=False).values[0, 0]
    np.testing.assert_allclose(found, [1, 0, 0, 0, 0, 0.5], atol=1e-5)


def test_the_graph_gives_the_same_flows(pair, batch) -> None:
    record = pair.model.record(batch[0], attention_mask=batch[1])
    found = flow(record, normalise=False, last_layer=1, residual=0.2)
    for row, real in enumerate(batch[1].bool().numpy()):
        graph = flow_graph(record, row, last_layer=1, residual=0.2)
        top = (2, real.sum() - 1)
        values = [nx.maximum_flow_value(graph, top, (0, j)) for j in range(real.sum())]
        np.testing.assert_allclose(found.values[row, 0, real], values, atol=2e-6)
        leaving = [
            sum(edge["capacity"] for *_, edge in graph.out_edges((1, i), data=True))
            for i in range(real.sum())
        ]
        np.testing.assert_allclose(leaving, 1, atol=1e-6)
        assert graph.nodes[(0, 1)] == {"token": record.strings[row][np.flatnonzero(real)[1]]}
        assert graph.nodes[(2, 0)]["layer"] == 1
    assert graph.graph["question"] == found.attrs["question"]
    with pytest.raises(AnalysisError, match="no batch row 3; the record has rows 0 to 2"):
        flow_graph(record, 3)


def test_ugly_cases(pairs: Callable, monkeypatch) -> None:
    model = pairs("llama").model
    np.testing.assert_allclose(flow(model.record(torch.tensor([[5]]))), [[[1.0]]])
    ids = torch.arange(3, 9)[None]
    with model.edit(hw.Knockout(queries=[-1], keys="all")):
        blocked = model.record(ids)
    np.testing.assert_allclose(flow(blocked).values[0, 0], [0, 0, 0, 0, 0, 1])
    assert np.isnan(flow(blocked, add_residual=False)).all()
    # the name of the module is that of its function
    lower(monkeypatch, "analyses.tokens.flow", LONGEST=5)
    with pytest.raises(AnalysisError, match="a text has 6 tokens and flow takes 5 at most"):
        flow(model.record(ids))


def test_weights_below_zero_are_no_capacities(pairs: Callable) -> None:
    model = pairs("llama").model
    with model.edit(hw.Normaliser("cog")):
        record = model.record(torch.arange(5, 11)[None], statistics=("row_mass",))
    with pytest.raises(AnalysisError, match="may be negative"):
        flow(record, heads="min")
