"""Circuits as graphs: from scores to a `networkx.DiGraph`, from a graph to a mask of edges, and the selection of edges.

Nodes are "embed", "5.1", "mlp.3", in a decoder "cross.3", and "logits", and the inputs of heads: "5.1.q", or "5.kv0.k"
where heads share keys and values. An edge goes from a node to an input and carries `score` and `input`. An edge of kind
"inside" joins each input of a head to that head. All attributes are texts or numbers, so that files can store them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import networkx as nx
import torch
from torch import Tensor

from headwater.analyses._catalogue.graph import Graph
from headwater.analyses._catalogue.settings import Bounds, checked
from headwater.analyses._streams.component_graph import EMBED, LOGITS, Inputs, Wiring
from headwater.analyses._streams.ranked_edges import best_first, greedily, scores_of
from headwater.analyses._streams.redraws import Redraws, without_examples
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head

HEAD_INPUTS = ("q", "k", "v")


def graph_of(
    wiring: Wiring, scores: Tensor | None, attrs: Mapping[str, Any], nodes: Tensor | None = None
) -> nx.DiGraph:
    """The graph of all edges with their scores [node, input]; `nodes` [node] are scores of the nodes."""
    graph = Graph(**attrs)
    graph.graph.update(_shape_of(wiring))
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


def _shape_of(wiring: Wiring) -> dict[str, int]:
    """Attributes from which the nodes and edges of the model can be named without it."""
    model = wiring.model
    parallel = any(layer.parallel for layer in wiring.layers.values())
    heads = {"n_layers": len(wiring.layers), "n_heads": model.n_heads, "d_model": model.d_model}
    return {**heads, "parallel_attn_mlp": int(parallel)}


def told_by_name(name: str) -> dict[str, Any]:
    """The kind, layer and head of a node, from its name: "embed", "mlp.3", "mixer.2" or "5.1"."""
    if name == EMBED:
        return {"kind": "embed"}
    kind, _, layer = name.partition(".")
    if kind in ("mlp", "mixer", "cross"):
        return {"kind": kind, "layer": int(layer)}
    return {"kind": "head", **Head.parse(name)._asdict()}


def edges_of(graph: nx.DiGraph) -> list[tuple[str, str]]:
    """The edges from nodes to inputs, without those inside of heads."""
    return [(u, v) for u, v, kind in graph.edges(data="kind") if kind != "inside"]


def wiring_of(model: HookedModel, graph: nx.DiGraph) -> Wiring:
    """The wiring whose inputs are named as in the graph: keys per query head or per key–value head."""
    return Wiring(model, "kv" if any(".kv" in name for name in graph) else "head")


def found_on(model: HookedModel, graph: nx.DiGraph) -> dict[str, str]:
    """Attributes of a result: the other model whose circuit this is, with a warning; none where it is this model's."""
    other, name = (str(graph.graph.get(told, "")) for told in ("revision", "model"))
    alike = (
        other.partition(":")[0] == model.revision.partition(":")[0]
    )  # files of older versions have other digests
    if other == model.revision or not (alike or name) or (not alike and name == model.name):
        return {}
    warnings.warn(
        f"the circuit was found on {name} ({other[:24]}…) and is judged on {model.name}, whose weights, "
        "precision or settings differ",
        stacklevel=4,
    )
    return {"found_on": f"{name} {other}"}


def mask_of(wiring: Wiring, graph: nx.DiGraph) -> Tensor:
    """The edges of a graph, bool [node, input]; AnalysisError for one that the model does not have."""
    found = torch.zeros_like(wiring.edges())
    found[tuple(places_of(wiring, edges_of(graph)).T)] = True
    return found


def places_of(wiring: Wiring, edges: Sequence[tuple[str, str]]) -> Tensor:
    """The numbers of the node and the input of each edge, [edge, 2]; AnalysisError for one that the model lacks."""
    place = {name: number for number, name in enumerate(wiring.receivers)}
    for sender, receiver in edges:
        if sender not in wiring.number or receiver not in place:
            raise AnalysisError(f"{wiring.model.name} has no edge {sender} → {receiver}")
    found = torch.tensor([(wiring.number[u], place[v]) for u, v in edges], dtype=torch.long).reshape(-1, 2)
    if len(absent := (~wiring.edges()[tuple(found.T)]).nonzero()):
        sender, receiver = edges[int(absent[0])]
        raise AnalysisError(f"{sender} does not come before {receiver} in {wiring.model.name}")
    return found


def leading(wiring: Wiring, kept: Tensor) -> Tensor:
    """The inputs from which edges of `kept` [circuit, node, input] lead to the logits, bool [circuit, input]."""
    says = kept.new_zeros(len(kept), len(wiring.senders))
    found = kept.new_zeros(len(kept), len(wiring.receivers))
    for group in reversed(wiring.groups):
        for number, name in enumerate(group.names, group.first):
            found[:, number] = True if name == LOGITS else says[:, _owners(wiring, group, name)].any(1)
        says |= (kept[:, :, group.span] & found[:, None, group.span]).any(2)
    return found


def connected(wiring: Wiring, kept: Tensor) -> Tensor:
    """`kept` [circuit, node, input] without edges that no path from the embedding reaches or none to the logits leaves.

    It is `pruned` for many circuits of one model at once.
    """
    reached = kept.new_zeros(len(kept), len(wiring.senders))
    reached[:, wiring.number[EMBED]] = True
    for group in wiring.groups:
        for number, name in enumerate(group.names, group.first):
            if name != LOGITS:
                heard = (kept[:, :, number] & reached).any(1, keepdim=True)
                reached[:, _owners(wiring, group, name)] |= heard
    return kept & reached[:, :, None] & leading(wiring, kept)[:, None]


def _owners(wiring: Wiring, group: Inputs, name: str) -> list[int]:
    """The numbers of the nodes that read through an input."""
    nodes = wiring.heads_of(name) if group.kind in HEAD_INPUTS else [name]
    return [wiring.number[node] for node in nodes]


def pruned(graph: nx.DiGraph) -> nx.DiGraph:
    """A copy without nodes that lack parents or children, removed until none remains; embed and logits stay."""
    graph = graph.copy()
    ends = {EMBED, LOGITS}
    while gone := [n for n in graph if n not in ends and not (graph.in_degree(n) and graph.out_degree(n))]:
        graph.remove_nodes_from(gone)
    return graph


@checked
def select_circuit(
    graph: nx.DiGraph,
    n: Annotated[int, Bounds(0)],
    selection: Literal["top", "greedy"] = "top",
    *,
    signed: bool = False,
) -> nx.DiGraph:
    """The circuit of the `n` best edges: "top" by score alone, "greedy" from the logits down.

    Greedy repeatedly adds the best edge into a node that is already in the circuit (as in Dijkstra's algorithm). Nodes
    without parents or without children are then removed with their edges, so fewer than `n` edges may remain. Best
    means the largest |score|, or with `signed` the largest score. A graph whose nodes alone have scores
    (`level="node"`) gives the best `n` nodes and every edge between them.

    The attribute `stability` of the circuit is the mean share `|a ∩ b| / |a ∪ b|` of its edges (or nodes) and those of
    circuits chosen in the same way when the pairs or texts of the graph are redrawn, with replacement;
    `stability_by_chance` is that of two random sets of these sizes, and `stability_over` says over how many redraws
    (100; the greedy choice in more than 20,000 edges: 10). Where there is nothing to redraw, as for one pair,
    `stability` says so.
    Source: Hanna, Pezzelle & Belinkov 2024 (arXiv 2403.17806); compared with their code.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> clean = "When Mary and John went to the store , John gave a drink to"
    >>> corrupt = "When Mary and John went to the store , Mary gave a drink to"
    >>> whole = hw.analyses.edge_attribution(model, [(clean, corrupt)], answer="Mary", wrong="John", steps=1)
    >>> ("mlp.3", "logits") in hw.analyses.select_circuit(whole, 100).edges
    True
    """
    scores, of_nodes = scores_of(graph, signed)
    if of_nodes:
        found = _of_nodes(graph, best_first(scores)[:n])
    else:
        kept = set(best_first(scores)[:n] if selection == "top" else greedily(graph, scores, n))
        found = graph.copy()
        found.remove_edges_from([edge for edge in edges_of(graph) if edge not in kept])
        found = pruned(found)
    found.graph.update(Redraws.of(graph, signed).told(n, selection))
    return without_examples(found)


def _of_nodes(graph: nx.DiGraph, chosen: list[str]) -> nx.DiGraph:
    """The chosen nodes, embed and logits, with their inputs and every edge between them."""
    stay = {*chosen, EMBED, LOGITS}
    inputs = [name for name, kind in graph.nodes(data="kind") if kind == "input"]
    stay.update([name for name in inputs if not stay.isdisjoint(graph.successors(name))])
    return pruned(graph.subgraph(stay).copy())
