"""Circuits in the two file forms of the Mechanistic Interpretability Benchmark (Mueller et al. 2025): JSON and tensors.

The JSON has `cfg`, `nodes` and `edges`; nodes are "input", "a0.h1" and "m3", edges "a0.h1->a2.h3<q>", each with `score`
and `in_graph`. The tensors `edges_scores` and `edges_in_graph` are [source, destination], `nodes_in_graph` and
`nodes_scores` [source]. The benchmark keeps them in a pickle; here they are a safetensors file whose metadata holds
`cfg`. Both describe a model whose query heads have keys and values of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import networkx as nx
import numpy as np
import torch
from safetensors.torch import load, save

from headwater.analyses._catalogue.graph import Graph
from headwater.analyses.circuits._graphs import HEAD_INPUTS, told_by_name
from headwater.lens.files import parse_json

EMBED, INPUT, LOGITS = "embed", "input", "logits"
MOST_EDGES = 2**21  # an 8B Llama has 1.6 million
SHAPE = ("n_layers", "n_heads", "d_model", "parallel_attn_mlp")
OF_NEURONS = ("neurons", "neurons_scores", "neurons_in_graph")


class Strange(Exception):
    """The file, or the graph, does not hold what the form has."""


@dataclass(frozen=True)
class Shape:
    """`cfg` of the form: what decides which nodes and edges there are."""

    n_layers: int
    n_heads: int
    d_model: int
    parallel_attn_mlp: bool

    @classmethod
    def of(cls, cfg: Any) -> Shape:
        if not isinstance(cfg, Mapping):
            raise Strange("cfg is no table of numbers")
        for name in SHAPE[:3]:
            if type(cfg.get(name)) is not int or not 0 < cfg[name] <= 2**20:
                raise Strange(f"cfg has {name}={str(cfg.get(name))[:40]!r}, not a whole number from 1")
        parallel = cfg.get(SHAPE[3])
        if not isinstance(parallel, bool | int):
            raise Strange(f"cfg has {SHAPE[3]}={str(parallel)[:40]!r}, not true or false")
        found = cls(cfg["n_layers"], cfg["n_heads"], cfg["d_model"], bool(parallel))
        if found.n_layers * found.n_heads > 2**15 or found.most() > MOST_EDGES:
            raise Strange(f"cfg describes more than {MOST_EDGES} edges")
        return found

    def most(self) -> int:
        """The number of edges, counted without making them."""
        wide = self.n_heads + 1
        sent = [1 + layer * wide for layer in range(self.n_layers)]
        serial = 0 if self.parallel_attn_mlp else self.n_heads
        return sum((3 * self.n_heads + 1) * n + serial for n in sent) + 1 + self.n_layers * wide

    def senders(self) -> list[str]:
        layers = range(self.n_layers)
        return [
            EMBED,
            *(n for at in layers for n in (*(f"{at}.{h}" for h in range(self.n_heads)), f"mlp.{at}")),
        ]

    def receivers(self) -> list[tuple[str, str, int]]:
        """Name, kind and number of senders before each input, in the order of the columns."""
        found = []
        for layer in range(self.n_layers):
            before = 1 + layer * (self.n_heads + 1)
            found += [
                (f"{layer}.{h}.{kind}", kind, before) for kind in HEAD_INPUTS for h in range(self.n_heads)
            ]
            found.append((f"mlp.{layer}", "mlp", before + (0 if self.parallel_attn_mlp else self.n_heads)))
        return [*found, (LOGITS, LOGITS, 1 + self.n_layers * (self.n_heads + 1))]

    def known(self) -> np.ndarray:
        """Mask of the edges that there are, [source, destination]."""
        counts = np.array([count for _, _, count in self.receivers()])
        return np.arange(len(self.senders()))[:, None] < counts[None]


@dataclass(frozen=True, eq=False)
class Content:
    """What both forms hold: scores and membership of edges [source, destination], and of nodes [source]."""

    shape: Shape
    scores: np.ndarray
    inside: np.ndarray
    of_nodes: np.ndarray | None
    nodes: np.ndarray


def graph_of(content: Content, every_edge: bool) -> nx.DiGraph:
    """The circuit; `every_edge`, or where the file chooses none or all, all edges."""
    shape, known = content.shape, content.shape.known()
    inside = content.inside & known
    chosen = known if every_edge or not inside.any() else inside
    scored = content.of_nodes is None or content.scores[known].any()
    graph = Graph()
    graph.graph.update({name: int(value) for name, value in asdict(shape).items()})
    senders = shape.senders()
    for place, name in enumerate(senders):
        more = {} if content.of_nodes is None else {"score": float(content.of_nodes[place])}
        graph.add_node(name, **told_by_name(name), **more)
    graph.add_node(LOGITS, kind=LOGITS)
    for column, (receiver, kind, _) in enumerate(shape.receivers()):
        if kind in HEAD_INPUTS:
            head = receiver.rpartition(".")[0]
            graph.add_node(receiver, kind="input", layer=int(head.split(".")[0]), input=kind)
            graph.add_edge(receiver, head, kind="inside")
        for place in chosen[:, column].nonzero()[0].tolist():
            more = {"score": float(content.scores[place, column])} if scored else {}
            graph.add_edge(senders[place], receiver, kind="edge", input=kind, **more)
    return graph


def content_of(graph: nx.DiGraph) -> Content:
    """What the forms hold of a graph of `edge_attribution` or of a circuit chosen from it."""
    if any(name not in graph.graph for name in SHAPE):
        raise Strange(
            "it does not say the shape of its model; give a graph of edge_attribution or a choice from it"
        )
    shape = Shape.of({name: graph.graph[name] for name in SHAPE})
    rows = {name: place for place, name in enumerate(shape.senders())}
    columns = {name: place for place, (name, _, _) in enumerate(shape.receivers())}
    known = shape.known()
    scores, inside = np.zeros(known.shape), np.zeros(known.shape, dtype=bool)
    edges = [each for each in graph.edges(data=True) if each[2].get("kind") != "inside"]
    scored = sum("score" in about for _, _, about in edges)
    if 0 < scored < len(edges):
        raise Strange(
            f"{scored} of its {len(edges)} edges have a score, and the form knows no edge without one; score all"
        )
    for u, v, about in edges:
        if u not in rows or v not in columns or not known[rows[u], columns[v]]:
            mend = '; give key_values="head"' if ".kv" in str(v) else ""
            raise Strange(f"the form has no edge {str(u)[:40]} → {str(v)[:40]}{mend}")
        inside[rows[u], columns[v]] = True
        scores[rows[u], columns[v]] = about.get("score", 0.0)
    nodes = np.array([name in graph for name in rows])
    told = [graph.nodes[name].get("score") if name in graph else 0.0 for name in rows]
    of_nodes = None if None in told or not any(told) else np.array(told, dtype=float)
    return Content(shape, scores, inside, of_nodes, nodes)


def to_json(content: Content) -> str:
    """The text of the JSON form."""
    senders = [_name_of(name) for name in content.shape.senders()]
    nodes: dict[str, dict[str, Any]] = {
        name: {"in_graph": bool(inside)} for name, inside in zip(senders, content.nodes, strict=True)
    }
    for name, score in zip(senders, () if content.of_nodes is None else content.of_nodes, strict=False):
        nodes[name]["score"] = float(score)
    nodes[LOGITS] = {"in_graph": True}
    edges = {}
    for column, (receiver, _, count) in enumerate(content.shape.receivers()):
        for place in range(count):
            about = {
                "score": float(content.scores[place, column]),
                "in_graph": bool(content.inside[place, column]),
            }
            edges[f"{senders[place]}->{_name_of(receiver)}"] = about
    told = {"cfg": asdict(content.shape), "nodes": nodes, "edges": edges}
    return json.dumps(told, allow_nan=False)


def of_json(given: dict[str, Any]) -> Content:
    """The content of the JSON form. `Strange` says what is none."""
    shape = Shape.of(given.get("cfg"))
    nodes, edges = given.get("nodes"), given.get("edges")
    if not isinstance(nodes, dict) or not isinstance(edges, dict):
        raise Strange("nodes and edges are no tables by name")
    rows = {_name_of(name): place for place, name in enumerate(shape.senders())}
    columns = {_name_of(name): place for place, (name, _, _) in enumerate(shape.receivers())}
    known = shape.known()
    scores, inside = np.zeros(known.shape), np.zeros(known.shape, dtype=bool)
    for name, about in edges.items():
        u, _, v = name.partition("->")
        if u not in rows or v not in columns or not known[rows[u], columns[v]]:
            raise Strange(f"a model of this cfg has no edge {name[:60]!r}")
        scores[rows[u], columns[v]] = _score(f"edge {name[:60]!r}", about)
        inside[rows[u], columns[v]] = about.get("in_graph") is True
    chosen, of_nodes = np.zeros(len(rows), dtype=bool), np.zeros(len(rows))
    for name, about in nodes.items():
        if name not in rows and name != LOGITS:
            raise Strange(f"a model of this cfg has no node {name[:60]!r}")
        score = _score(f"node {name[:60]!r}", about)
        if name != LOGITS:
            chosen[rows[name]], of_nodes[rows[name]] = about.get("in_graph") is True, score
    scored = any("score" in about for about in nodes.values())
    return Content(shape, scores, inside, of_nodes if scored else None, chosen)


def _score(what: str, about: Any) -> float:
    if not isinstance(about, dict):
        raise Strange(f"{what} is described by no table")
    if any(name in about for name in OF_NEURONS):
        raise Strange(f"{what} chooses neurons; circuits here are of whole heads and MLPs")
    score = about.get("score", 0.0)
    if isinstance(score, bool) or not isinstance(score, int | float) or not -1e300 < score < 1e300:
        raise Strange(f"{what} has score={str(score)[:40]!r}, not a finite number")
    return float(score)


def to_tensors(content: Content) -> bytes:
    """The bytes of the tensor form."""
    held = {
        "edges_scores": torch.tensor(content.scores, dtype=torch.float32),
        "edges_in_graph": torch.tensor(content.inside),
        "nodes_in_graph": torch.tensor(content.nodes),
    }
    if content.of_nodes is not None:
        held["nodes_scores"] = torch.tensor(content.of_nodes, dtype=torch.float32)
    return save(held, {"cfg": json.dumps(asdict(content.shape))})


def of_tensors(given: bytes) -> Content:
    """The content of the tensor form. `Strange` says what is none."""
    size = int.from_bytes(given[:8], "little")
    if size > min(len(given) - 8, 2**16):
        raise Strange("its first 8 bytes are not the length of a short header")
    header = parse_json(given[8 : 8 + size].decode("utf-8", "replace"), "its header", Strange)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    cfg = metadata.get("cfg") if isinstance(metadata, dict) else None
    if not isinstance(cfg, str):
        raise Strange("its metadata holds no cfg")
    shape = Shape.of(parse_json(cfg, "cfg", Strange))
    if odd := sorted(name for name in OF_NEURONS if name in header):
        raise Strange(f"it holds {odd[0]}; circuits here are of whole heads and MLPs")
    held, known = load(given), shape.known()
    wanted = {"edges_scores": known.shape, "edges_in_graph": known.shape, "nodes_in_graph": known.shape[:1]}
    for name, size_of in wanted.items():
        if name not in held or held[name].shape != size_of:
            got = tuple(held[name].shape) if name in held else "nothing"
            raise Strange(f"{name} must be of shape {tuple(size_of)} for this cfg, and is {got}")
    scores, of_nodes = held["edges_scores"].double().numpy(), held.get("nodes_scores")
    if not np.isfinite(scores[known]).all() or (of_nodes is not None and not of_nodes.isfinite().all()):
        raise Strange("a score is not a finite number")
    if of_nodes is not None and of_nodes.shape != known.shape[:1]:
        raise Strange(f"nodes_scores must be of shape {tuple(known.shape[:1])} for this cfg")
    nodes = None if of_nodes is None else of_nodes.double().numpy()
    return Content(
        shape, scores, held["edges_in_graph"].bool().numpy(), nodes, held["nodes_in_graph"].bool().numpy()
    )


def _name_of(name: str) -> str:
    """The benchmark's name of a node or an input."""
    if found := re.fullmatch(r"(\d+)\.(\d+)(?:\.([qkv]))?", name):
        return f"a{found[1]}.h{found[2]}" + (f"<{found[3]}>" if found[3] else "")
    return {EMBED: INPUT}.get(name, name.replace("mlp.", "m"))
