"""Circuits as graphs: from scores to a `networkx.DiGraph`, from a graph to the edges that are in it, and choosing some.

Nodes are "embed", "5.1", "mlp.3" and "logits", and the inputs of heads: "5.1.q", "5.1.k", "5.1.v", or "5.kv0.k" where
heads share it. An edge goes from a node to an input and carries `score` and `input`; from each input an edge of kind
"inside" leads on to its head. Everything on a graph is text or a number, so files keep it whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Annotated, Any, Literal

import networkx as nx
from torch import Tensor

from headwater.analyses._catalogue.settings import Bounds, checked
from headwater.analyses._streams.component_graph import EMBED, LOGITS, KeyValues, Wiring
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head

HEAD_INPUTS = ("q", "k", "v")


def graph_of(
    wiring: Wiring, scores: Tensor | None, attrs: Mapping[str, Any], nodes: Tensor | None = None
) -> nx.DiGraph:
    """Every edge of a model with its score [node, input], and every node's where there is one [node]."""
    graph = nx.DiGraph(**attrs)
    for place, name in enumerate(wiring.senders):
        more = {} if nodes is None else {"score": float(nodes[place])}
        graph.add_node(name, **told_by_name(name), **more)
    graph.add_node(LOGITS, kind="logits")
    for group in wiring.groups:
        for number, receiver in enumerate(group.names, group.first):
            if group.kind in HEAD_INPUTS:
                graph.add_node(receiver, kind="input", layer=group.layer, input=group.kind)
                for head in wiring.heads_of(receiver):
                    graph.add_edge(receiver, head, kind="inside")
            for place, sender in enumerate(wiring.senders[: group.senders]):
                more = {} if scores is None else {"score": float(scores[place, number])}
                graph.add_edge(sender, receiver, kind="edge", input=group.kind, **more)
    return graph


def told_by_name(name: str) -> dict[str, Any]:
    """What a node is, and its layer and head, from its name: "embed", "mlp.3" or "5.1"."""
    if name == EMBED:
        return {"kind": "embed"}
    if name.startswith("mlp."):
        return {"kind": "mlp", "layer": int(name.removeprefix("mlp."))}
    return {"kind": "head", **Head.parse(name)._asdict()}


def edges_of(graph: nx.DiGraph) -> list[tuple[str, str]]:
    """The edges from nodes to inputs, without those inside of heads."""
    return [(u, v) for u, v, kind in graph.edges(data="kind") if kind != "inside"]


def wiring_of(model: HookedModel, graph: nx.DiGraph) -> Wiring:
    """The model taken apart as the graph's inputs are named."""
    names = [name for name in graph if name.split(".")[-1] in ("k", "v")]
    kind: KeyValues = "kv" if any(".kv" in name for name in names) else "head"
    return Wiring(model, kind)


def mask_of(wiring: Wiring, graph: nx.DiGraph) -> Tensor:
    """The edges of a graph, bool [node, input]; AnalysisError for one that the model does not have."""
    known = wiring.edges()
    found = known.new_zeros(known.shape)
    place = {name: number for number, name in enumerate(wiring.receivers)}
    for sender, receiver in edges_of(graph):
        if sender not in wiring.number or receiver not in place:
            raise AnalysisError(f"{wiring.model.name} has no edge {sender} → {receiver}")
        if not known[wiring.number[sender], place[receiver]]:
            raise AnalysisError(f"{sender} does not come before {receiver} in {wiring.model.name}")
        found[wiring.number[sender], place[receiver]] = True
    return found


def pruned(graph: nx.DiGraph) -> nx.DiGraph:
    """Without nodes that nothing leads to or that lead to nothing, until none is left; embed and logits stay."""
    graph = graph.copy()
    while True:
        gone = [
            name
            for name in graph
            if name not in (EMBED, LOGITS) and (graph.in_degree(name) == 0 or graph.out_degree(name) == 0)
        ]
        if not gone:
            return graph
        graph.remove_nodes_from(gone)


@checked
def select_circuit(
    graph: nx.DiGraph,
    n: Annotated[int, Bounds(0)],
    selection: Literal["top", "greedy"] = "top",
    *,
    signed: bool = False,
) -> nx.DiGraph:
    """The circuit of the `n` best edges: "top" by score alone, "greedy" from the logits down.

    Greedy takes the best edge into what is already part of the circuit, again and again (as Dijkstra's algorithm
    walks). Nodes without parents or without children are then taken away with their edges, so fewer than `n` may be
    left. Best is the largest |score|, or the largest score with `signed`. A graph with scores on its nodes alone
    (`level="node"`) gives the best `n` nodes and every edge between them.
    Source: Hanna, Pezzelle & Belinkov 2024 (arXiv 2403.17806) and their code, checked.
    """

    def worth(score: float) -> float:
        return score if signed else abs(score)

    given = {(u, v): s for u, v, s in graph.edges(data="score") if s is not None}
    told = {name: about["score"] for name, about in graph.nodes.items() if "score" in about}
    for place, score in (given | told).items():
        if not isinstance(score, Real) or not math.isfinite(score):
            name = place if isinstance(place, str) else " → ".join(map(str, place))
            raise AnalysisError(
                f"the score of {name} is {score!r}; give finite numbers, as of edge_attribution"
            )
    scores = {edge: worth(score) for edge, score in given.items()}
    nodes = {name: worth(score) for name, score in told.items()}
    if not scores and nodes:
        return _of_nodes(graph, sorted(nodes, key=lambda name: -nodes[name])[:n])
    if not scores:
        raise AnalysisError("the graph has no scores to choose by; give one of edge_attribution")
    best = sorted(scores, key=lambda edge: -scores[edge])[:n]
    kept = best if selection == "top" else _greedy(graph, scores, n)
    return pruned(_only(graph, set(kept)))


def _only(graph: nx.DiGraph, kept: set[tuple[str, str]]) -> nx.DiGraph:
    found = graph.copy()
    found.remove_edges_from([edge for edge in edges_of(graph) if edge not in kept])
    return found


def _greedy(graph: nx.DiGraph, scores: dict[tuple[str, str], float], n: int) -> list[tuple[str, str]]:
    inside, kept, open_edges = set(), [], {}

    def include(name: str) -> None:
        if name in inside:
            return
        inside.add(name)
        readers = [name] if graph.nodes[name]["kind"] in ("mlp", "logits") else list(graph.predecessors(name))
        for reader in readers:
            open_edges.update(
                {edge: scores[edge] for edge in graph.in_edges(reader) if edge in scores and edge not in kept}
            )

    include(LOGITS)
    while open_edges and len(kept) < n:
        best = max(open_edges, key=lambda edge: open_edges[edge])
        del open_edges[best]
        kept.append(best)
        include(best[0])
    return kept


def _of_nodes(graph: nx.DiGraph, chosen: list[str]) -> nx.DiGraph:
    inputs = {name for name, kind in graph.nodes(data="kind") if kind == "input"}
    stay = {*chosen, EMBED, LOGITS}
    stay |= {name for name in inputs if any(head in stay for head in graph.successors(name))}
    return pruned(graph.subgraph(stay).copy())
