"""The curve of a benchmark of circuits, held to an evaluator that is written from its definition alone: dense runs of
the model edge by edge, its own choice and pruning of edges, its own sums.

Mutations seen to fail: signed and absolute scores exchanged, the last share left out of the areas, circuits not pruned,
the greedy choice in the place of the best, shares rounded up, the areas over numbers of edges, heads' keys shared
wrongly, pairs of another length in the wrong places.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math

import edge_oracle
import networkx as nx
import numpy as np
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses._streams.component_graph import Wiring
from headwater.analyses.circuits._graphs import connected, edges_of, graph_of, mask_of, pruned, wiring_of
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo

GRID = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]  # per cent of the edges
Edge = tuple[str, str]


@functools.cache
def models(name: str):
    plain = zoo.build(name)
    twin = copy.deepcopy(plain).double()
    model = hw.load(plain)
    model.hf.double()
    return model, twin


@functools.cache
def prompts() -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Five pairs of two lengths, the lengths mixed."""
    draw = torch.Generator().manual_seed(8)
    return tuple(tuple(torch.randint(3, 90, (2, n), generator=draw)) for n in (6, 4, 6, 6, 4))  # type: ignore[misc]


def measure(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 7] - logits[:, -1, 11]


@functools.cache
def attributed(name: str, key_values: str = "head") -> nx.DiGraph:
    return analyses.edge_attribution(
        models(name)[0], prompts(), measure=measure, steps=2, key_values=key_values, draws=1
    )


def heads_of(receiver: str, model: hw.HookedModel) -> list[str]:
    """The nodes that read through an input, from its name."""
    parts = receiver.split(".")
    if parts[-1] not in "qkv":
        return [receiver]
    if not parts[1].startswith("kv"):
        return [f"{parts[0]}.{parts[1]}"]
    size = model.n_heads // model.n_kv_heads
    return [f"{parts[0]}.{size * int(parts[1][2:]) + n}" for n in range(size)]


def without_loose_ends(edges: set[Edge], model: hw.HookedModel) -> set[Edge]:
    """Edges between nodes that are reached and that speak, taken out until none is loose."""
    while True:
        speak = {u for u, _ in edges} | {"logits"}
        reached = {node for _, v in edges for node in heads_of(v, model)} | {"embed"}
        left = {
            (u, v) for u, v in edges if u in reached and any(node in speak for node in heads_of(v, model))
        }
        if left == edges:
            return edges
        edges = left


def chosen(scores: dict[Edge, float], count: int, greedy: bool, model: hw.HookedModel) -> set[Edge]:
    if not greedy:
        return set(sorted(scores, key=lambda edge: scores[edge])[::-1][:count])
    kept: set[Edge] = set()
    while len(kept) < count:
        inside = {u for u, _ in kept} | {"logits"}
        free = [e for e in scores if e not in kept and inside & {*heads_of(e[1], model)}]
        kept.add(max(free, key=lambda edge: scores[edge]))
    return kept


def measured(twin, circuit: set[Edge], everything: list[Edge], kv: bool) -> np.ndarray:
    found = []
    for clean, corrupt in prompts():
        other = edge_oracle.run(twin, corrupt[None]).nodes
        out = frozenset(everything) - circuit
        found.append(float(measure(edge_oracle.run(twin, clean[None], other, out, kv=kv).logits)))
    return np.array(found)


def areas(
    kept: list[np.ndarray], size: list[np.ndarray], all_in: np.ndarray, none: np.ndarray, pick: list[int]
):
    def f(values: np.ndarray) -> float:
        return (values[pick].mean() - none[pick].mean()) / (all_in[pick].mean() - none[pick].mean())

    cpr = cmd = 0.0
    for n in range(9):
        width = (GRID[n + 1] - GRID[n]) / 100
        cpr += width * (f(kept[n]) + f(kept[n + 1])) / 2
        cmd += width * (abs(1 - f(size[n])) + abs(1 - f(size[n + 1]))) / 2
    return [f(values) for values in kept], [f(values) for values in size], cpr, cmd


@pytest.mark.parametrize(
    ("name", "key_values", "selection"),
    [
        ("llama", "head", "top"),
        ("llama", "kv", "greedy"),
        pytest.param("gpt2", "head", "greedy", marks=pytest.mark.slow),
        pytest.param("gpt_neox", "head", "top", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_the_curve_is_that_of_an_evaluator_written_from_the_definition(name, key_values, selection) -> None:
    model, twin = models(name)
    graph = attributed(name, key_values)
    scores = {(u, v): s for u, v, s in graph.edges(data="score") if s is not None}
    everything, kv = list(scores), key_values == "kv"
    circuits = [
        [
            without_loose_ends(
                chosen(some, int(share / 100 * len(scores)), selection == "greedy", model), model
            )
            for share in GRID
        ]
        for some in (scores, {edge: abs(score) for edge, score in scores.items()})
    ]
    runs = {frozenset(c): np.empty(0) for row in circuits for c in row} | {frozenset(): np.empty(0)}
    for circuit in runs:
        runs[circuit] = measured(twin, set(circuit), everything, kv)
    kept, size = ([runs[frozenset(c)] for c in row] for row in circuits)
    none, all_in = runs[frozenset()], runs[frozenset(everything)]

    found = analyses.circuit_curve(
        model, graph, prompts(), measure=measure, selection=selection, draws=60, seed=3
    )
    signed, absolute, cpr, cmd = areas(kept, size, all_in, none, [0, 1, 2, 3, 4])
    np.testing.assert_allclose(found.f.sel(bound="mean"), [signed, absolute], atol=1e-6)
    np.testing.assert_allclose(found.measure, [kept, size], atol=1e-9)
    assert found.edges.values.tolist() == [[len(c) for c in row] for row in circuits]
    assert float(found.cpr[0]) == pytest.approx(cpr, abs=1e-6)
    assert float(found.cmd[0]) == pytest.approx(cmd, abs=1e-6)
    assert abs(np.subtract(signed, absolute)).max() > 0.01  # the two rankings differ
    picks = np.random.default_rng(3).integers(5, size=(60, 5))
    drawn = [areas(kept, size, all_in, none, list(pick))[2:] for pick in picks]
    bounds = np.quantile(drawn, [0.025, 0.975], axis=0)
    np.testing.assert_allclose([found.cpr[1:], found.cmd[1:]], bounds.T, atol=1e-6)


@pytest.mark.parametrize(("name", "key_values"), [("gpt2", "head"), ("llama", "kv"), ("t5", "head")])
def test_masks_are_pruned_as_graphs_are(name, key_values) -> None:
    whole = hw.load(zoo.build(name))
    model = whole.part("decoder") if name == "t5" else whole
    graph = graph_of(Wiring(model, key_values), None, {})
    wiring = wiring_of(model, graph)
    draw = torch.Generator().manual_seed(1)
    for part in (0.02, 0.05, 0.1, 0.3):
        some = graph.copy()
        some.remove_edges_from([e for e in edges_of(graph) if torch.rand((), generator=draw) > part])
        expected = mask_of(wiring, pruned(some))
        assert torch.equal(connected(wiring, mask_of(wiring, some)[None])[0], expected)


def auroc(graph: nx.DiGraph, true: set[Edge], greedy: bool, model: hw.HookedModel) -> float:
    scores = {(u, v): abs(s) for u, v, s in graph.edges(data="score") if s is not None}
    points = []
    for share in GRID:
        count = math.ceil(share / 100 * len(scores))
        found = without_loose_ends(chosen(scores, count, greedy, model), model)
        points.append((len(found - true) / (len(scores) - len(true)), len(found & true) / len(true)))
    return sum((c - a) * (b + d) / 2 for (a, b), (c, d) in itertools.pairwise(points))


def test_the_area_below_the_roc_is_counted_edge_by_edge() -> None:
    model, _ = models("llama")
    graph = attributed("llama")
    scores = {(u, v): abs(s) for u, v, s in graph.edges(data="score") if s is not None}
    best = sorted(scores, key=lambda edge: -scores[edge])
    true = graph.copy()
    true.remove_edges_from([edge for edge in scores if edge not in set(best[5:60:2])])
    edges = set(edges_of(true))
    found = analyses.circuit_curve(model, graph, prompts(), measure=measure, known=true, draws=2)
    for choice in ("top", "greedy"):
        expected = auroc(graph, edges, choice == "greedy", model)
        assert float(found.auroc.sel(choice=choice)) == pytest.approx(expected, abs=1e-12)
        assert 0.6 < expected < 0.99
    rates = found.true_positive.sel(choice="top").values, found.false_positive.sel(choice="top").values
    assert (rates[0][-1], rates[1][-1]) == (1, 1)


def test_nodes_are_chosen_where_nodes_alone_have_scores() -> None:
    model, _ = models("gpt2")
    graph = analyses.edge_attribution(model, prompts(), measure=measure, steps=1, level="node", draws=1)
    found = analyses.circuit_curve(model, graph, prompts(), measure=measure, draws=2)
    count = sum("score" in about for _, about in graph.nodes(data=True))
    half = analyses.select_circuit(graph, count // 2)
    alone = analyses.circuit_faithfulness(model, half, prompts(), measure=measure, draws=2)
    assert int(found.edges.sel(ranking="absolute", share=0.5)) == len(edges_of(half))
    ours = float(found.f.sel(ranking="absolute", share=0.5, bound="mean"))
    assert ours == pytest.approx(float(alone["mean"].sel(score="faithfulness")[0]), abs=1e-9)


def test_a_circuit_of_another_model_says_so() -> None:
    model, _ = models("gpt2")
    other = copy.deepcopy(model.hf)
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    twin = hw.load(other)
    with pytest.warns(UserWarning, match="was found on .+ and is judged on"):
        found = analyses.circuit_curve(twin, attributed("gpt2"), prompts(), measure=measure, draws=2)
    assert found.attrs["found_on"].endswith(model.revision)
    with pytest.warns(UserWarning, match="was found on"):
        judged = analyses.circuit_faithfulness(twin, attributed("gpt2"), prompts(), measure=measure, draws=2)
    assert "found_on" in judged.attrs
    own = analyses.circuit_curve(model, attributed("gpt2"), prompts(), measure=measure, draws=2)
    assert "found_on" not in own.attrs


def test_what_has_no_curve_is_refused() -> None:
    model, _ = models("gpt2")
    graph = attributed("gpt2")
    same = [(clean, clean) for clean, _ in prompts()]
    with pytest.raises(AnalysisError, match="no share of the difference is defined"):
        analyses.circuit_curve(model, graph, same, measure=measure, draws=2)
    bare = nx.DiGraph([("embed", "logits")])
    with pytest.raises(AnalysisError, match="no scores to choose by"):
        analyses.circuit_curve(model, bare, prompts(), measure=measure, draws=2)
    sampled = analyses.edge_attribution(model, prompts(), measure=measure, how="exact", sample=5, draws=2)
    with pytest.raises(AnalysisError, match=r"5 of the \d+ edges of the graph have a score"):
        analyses.circuit_curve(model, sampled, prompts(), measure=measure, draws=2)
    with pytest.raises(AnalysisError, match="nothing to tell apart"):
        analyses.circuit_curve(model, graph, prompts(), measure=measure, known=graph, draws=2)
