"""Overlaps of circuits counted by hand, and chance against every pair of sets there is.

Mutations seen to fail: edges inside of heads counted, `sf(both)` for `sf(both - 1)`.
"""

from __future__ import annotations

from itertools import combinations

import networkx as nx
import numpy as np
import pytest

from headwater import analyses
from headwater.lens.errors import AnalysisError


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
