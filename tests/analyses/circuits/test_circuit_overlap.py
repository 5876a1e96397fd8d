"""Overlaps of circuits counted by hand, and chance against every pair of sets there is.

Mutations seen to fail: edges inside of heads counted, `sf(both)` for `sf(both - 1)`, the
last layer's heads never numbered anew.
"""

from __future__ import annotations

import copy
from itertools import combinations, permutations, product

import networkx as nx
import numpy as np
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo


def circuit(heads: tuple[int, ...]) -> nx.DiGraph:
    """Heads of layer 0 that write to the logits and read the embedding."""
    graph = nx.DiGraph()
    graph.add_node("embed", kind="embed")
    graph.add_node("logits", kind="logits")
    for head in heads:
        graph.add_node(f"0.{head}", kind="head", layer=0, head=head)
        graph.add_node(f"0.{head}.q", kind="input", layer=0)
        graph.add_edge(f"0.{head}.q", f"0.{head}", kind="inside")
        graph.add_edge("embed", f"0.{head}.q", kind="edge")
        graph.add_edge(f"0.{head}", "logits", kind="edge")
    return graph


def test_counts_and_chance() -> None:
    found = analyses.circuit_overlap(circuit((0, 1, 2)), circuit((2, 3)), circuit(tuple(range(6))))
    heads, nodes, edges = (found.sel(what=what) for what in ("heads", "nodes", "edges"))
    assert (int(heads.both), int(heads.only_a), int(heads.only_b)) == (1, 2, 1)
    assert float(heads.share) == 1 / 4
    assert float(nodes.share) == 3 / 6
    assert (int(edges.both), int(edges.only_a), int(edges.only_b)) == (
        2,
        4,
        2,
    )  # none from an input to its head
    assert float(edges.share) == 2 / 8
    shares = [
        len({*a} & {*b}) / len({*a} | {*b})
        for a in combinations(range(6), 3)
        for b in combinations(range(6), 2)
    ]
    common = [bool({*a} & {*b}) for a in combinations(range(6), 3) for b in combinations(range(6), 2)]
    assert float(heads.chance) == pytest.approx(np.mean(shares))
    assert float(heads.p) == pytest.approx(np.mean(common))


def test_the_same_circuit_no_circuit_and_another_model() -> None:
    same = analyses.circuit_overlap(circuit((0, 1)), circuit((0, 1)))
    np.testing.assert_array_equal(same.share, 1)
    assert same.chance.isnull().all()
    empty = analyses.circuit_overlap(circuit(()), circuit(()), circuit((0,)))
    assert np.isnan(empty.share.sel(what="heads"))
    with pytest.raises(AnalysisError, match=r"whole lacks 1 of the circuits' heads, as \(0, 5\)"):
        analyses.circuit_overlap(circuit((5,)), circuit((0,)), circuit((0, 1)))


def scored(seed: int, numbering: dict[int, list[int]] | None = None) -> nx.DiGraph:
    """Two layers of three heads with scores by chance; `numbering` gives each layer's heads new numbers."""
    draw, graph = np.random.default_rng(seed), nx.DiGraph()
    number = numbering or {0: [0, 1, 2], 1: [0, 1, 2]}
    graph.add_node("embed", kind="embed")
    graph.add_node("logits", kind="logits")
    for layer, head in product(range(2), range(3)):
        name = f"{layer}.{number[layer][head]}"
        graph.add_node(name, kind="head", layer=layer, head=number[layer][head])
        graph.add_node(f"{name}.q", kind="input", layer=layer)
        graph.add_edge(f"{name}.q", name, kind="inside")
        for sender in ("embed", *(f"0.{number[0][k]}" for k in range(3) if layer)):
            graph.add_edge(sender, f"{name}.q", kind="edge", score=draw.normal())
        graph.add_edge(name, "logits", kind="edge", score=draw.normal())
    graph.add_edge("embed", "logits", kind="edge", score=draw.normal())
    return graph


def test_circuits_of_models_whose_heads_have_other_numbers_are_the_same() -> None:
    a, b = scored(0), scored(0, {0: [1, 2, 0], 1: [2, 1, 0]})
    found = analyses.circuit_stability([a, b, a], 12)
    np.testing.assert_array_equal(found.share, 1)
    assert float(found.chance) < 1
    by_number = analyses.circuit_stability([a, b, a], 12, matched=False)
    assert (by_number.share.sel(what="edges") < 1).all()
    assert float(by_number.share.sel(what="edges", circuit=0)) == pytest.approx(
        (1 + float(by_number.share.sel(what="edges", circuit=1))) / 2
    )
    assert float(by_number.chance) < float(found.chance)
    circuit = analyses.select_circuit(a, 12)
    exact = float(analyses.circuit_overlap(circuit, circuit, a).chance.sel(what="edges"))
    many = analyses.circuit_stability([a, a], 12, matched=False, draws=400)
    assert float(many.chance) == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_the_numbering_is_one_of_all_and_no_layer_has_a_better_one(seed: int) -> None:
    a, b = (analyses.select_circuit(scored(seed + n), 10) for n in (10, 20))
    shares = {}
    for numbers in product(permutations(range(3)), repeat=2):
        names = {
            f"{layer}.{head}{end}": f"{layer}.{numbers[layer][head]}{end}"
            for layer, head, end in product(range(2), range(3), ("", ".q"))
        }
        one, other = (
            {(u, v) for u, v, kind in each.edges(data="kind") if kind == "edge"}
            for each in (a, nx.relabel_nodes(b, {old: new for old, new in names.items() if old in b}))
        )
        shares[numbers] = len(one & other) / len(one | other)
    given = [scored(seed + n) for n in (10, 20)]
    plain, found = (
        float(analyses.circuit_stability(given, 10, matched=matched)["mean"].sel(what="edges"))
        for matched in (False, True)
    )
    assert plain == shares[(0, 1, 2), (0, 1, 2)]
    reached = [numbers for numbers, share in shares.items() if share == pytest.approx(found)]
    assert any(
        all(share <= found for other, share in shares.items() if other[0] == own[0] or other[1] == own[1])
        for own in reached
    )


def test_a_model_with_its_heads_in_another_order_has_the_same_circuit() -> None:
    plain = zoo.build("gpt2").double()
    turned = copy.deepcopy(plain)
    heads, width = plain.config.n_head, plain.config.n_embd
    for block in turned.transformer.h:
        order = torch.arange(width).view(heads, -1).roll(1, 0).flatten()
        whole = torch.cat([order, order + width, order + 2 * width])
        block.attn.c_attn.weight.data = block.attn.c_attn.weight.data[:, whole]
        block.attn.c_attn.bias.data = block.attn.c_attn.bias.data[whole]
        block.attn.c_proj.weight.data = block.attn.c_proj.weight.data[order]
    generator = torch.Generator().manual_seed(2)
    pairs = [tuple(torch.randint(3, 90, (2, 6), generator=generator)) for _ in range(2)]
    graphs = [
        analyses.edge_attribution(hw.load(model), pairs, steps=1, answer=7, wrong=11)
        for model in (plain, turned)
    ]
    found, by_number = (analyses.circuit_stability(graphs, 30, matched=matched) for matched in (True, False))
    np.testing.assert_array_equal(found.share, 1)
    assert float(by_number["mean"].sel(what="edges")) < 0.8


def test_graphs_that_can_not_be_held_together_are_refused() -> None:
    with pytest.raises(AnalysisError, match="one graph has nothing to share with"):
        analyses.circuit_stability([scored(0)], 3)
    with pytest.raises(AnalysisError, match="models of one shape"):
        analyses.circuit_stability([scored(0), circuit((0, 1))], 3)
    shared = nx.relabel_nodes(scored(0), {"1.0.q": "1.kv0.q"})
    with pytest.raises(AnalysisError, match="matched=False"):
        analyses.circuit_stability([shared, shared], 3)
