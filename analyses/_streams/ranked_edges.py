"""The scores of a graph's edges, or of its nodes, in the order in which circuits take them."""

from __future__ import annotations

import heapq
import itertools
import math
from numbers import Real
from typing import Any

import networkx as nx

from headwater.analyses._streams.component_graph import LOGITS
from headwater.lens.errors import AnalysisError


def scores_of(graph: nx.DiGraph, signed: bool) -> tuple[dict[Any, float], bool]:
    """The finite scores, or their sizes, of edges or, if none has one, of nodes; and whether they are of nodes."""
    edges = {(u, v): s for u, v, s in graph.edges(data="score") if s is not None}
    nodes = {name: about["score"] for name, about in graph.nodes.items() if "score" in about}
    for place, score in (edges | nodes).items():
        if not isinstance(score, Real) or not math.isfinite(score):
            name = place if isinstance(place, str) else " → ".join(map(str, place))
            raise AnalysisError(
                f"the score of {name} is {score!r}; give finite numbers, as of edge_attribution"
            )
    scores: dict[Any, float] = {
        place: score if signed else abs(score) for place, score in (edges or nodes).items()
    }
    if not scores:
        raise AnalysisError("the graph has no scores to choose by; give one of edge_attribution")
    return scores, not edges


def best_first(scores: dict[Any, float]) -> list[Any]:
    """The places of scores from the largest to the smallest; equal ones in the order of the graph."""
    return sorted(scores, key=lambda place: -scores[place])


def greedily(graph: nx.DiGraph, scores: dict[Any, float], n: int) -> list[tuple[str, str]]:
    """The first `n` edges of the greedy choice, in its order; of equal ones that was reached first."""
    inside: set[str] = set()
    opened: set[str] = set()
    heap: list[tuple[float, int, tuple[str, str]]] = []
    kept: list[tuple[str, str]] = []

    def include(name: str) -> None:
        if name in inside:
            return
        inside.add(name)
        alone = graph.nodes[name]["kind"] != "head"
        readers = [name] if alone else list(graph.predecessors(name))
        for reader in readers:
            if reader not in opened:  # heads with common keys have a reader in common
                opened.add(reader)
                for edge in graph.in_edges(reader):
                    if edge in scores:
                        heapq.heappush(heap, (-scores[edge], next(order), edge))

    order = itertools.count()
    include(LOGITS)
    while heap and len(kept) < n:
        best = heapq.heappop(heap)[2]
        kept.append(best)
        include(best[0])
    return kept
