"""Graphs in files: GraphML, networkx' node-link JSON, the JSON of circuit viewers such as Neuronpedia, and the forms of
the benchmark MIB.

All but the last are read back with every attribute. The viewers' form holds nodes, edges and scores under the viewers'
names, and all attributes in a field "headwater" beside them. Reading a file runs nothing in it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, Literal
from xml.etree.ElementTree import ParseError

import networkx as nx

from headwater.analyses._catalogue.graph import Graph
from headwater.analyses._catalogue.settings import checked
from headwater.analyses.circuits import _mib_files
from headwater.lens.errors import AnalysisError
from headwater.lens.files import as_path, as_text, parse_json, read_bytes, write_bytes, write_text

Form = Literal["graphml", "json", "neuronpedia", "mib"]
ENDINGS = (".graphml", ".json", ".safetensors")
MOST_BYTES = 256 * 2**20
LONGEST_NAME = 200
NUMBERS = ("score", "weight", "count")
NODE_TYPES = {
    "embed": "embedding",
    "logits": "logit",
    "mlp": "mlp",
    "cross": "cross-attention",
    "head": "attention head",
    "input": "head input",
}
EDGE_TYPES = ("edge", "inside")
# errors of the parsers on text that is no graph
UNREADABLE = (
    ValueError, LookupError, TypeError, AttributeError, RecursionError, ParseError, nx.NetworkXException,
)  # fmt: skip


@checked
def write_circuit(graph: nx.DiGraph, path: str | Path, form: Form | None = None) -> Path:
    """Write a graph to `path`; without `form` the ending (.graphml, .json or .safetensors) decides.

    `form="mib"` is that of the Mechanistic Interpretability Benchmark: every edge that the model has with its score (0
    where the graph lacks it) and whether the graph has it, as JSON, or as tensors in a .safetensors file. It takes
    graphs of `edge_attribution` and circuits chosen from them, with `key_values="head"`; intervals are not kept.
    AnalysisError for a graph that `read_circuit` would refuse, such as one with a score that is NaN.

    >>> import headwater as hw
    >>> import networkx, tempfile
    >>> graph = networkx.DiGraph()
    >>> graph.add_node("embed", kind="embed")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     hw.analyses.write_circuit(graph, f"{folder}/circuit.graphml").name
    'circuit.graphml'
    """
    path = as_path(path, AnalysisError)
    form = _form(path) if form is None else form
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise AnalysisError(f"a circuit is a networkx.DiGraph; got an object of {type(graph).__name__}")
    try:
        _hold(graph)
        if form == "graphml":
            text = "\n".join(nx.generate_graphml(graph))
        elif form == "json":
            text = json.dumps(nx.node_link_data(graph, edges="links"), indent=1, allow_nan=False)
        elif form == "mib":
            held = _mib_files.content_of(graph)
            if path.suffix == ".safetensors":
                return write_bytes(path, _mib_files.to_tensors(held), AnalysisError)
            text = _mib_files.to_json(held)
        else:
            text = json.dumps(as_neuronpedia(graph), indent=1, allow_nan=False)
    except (_Strange, _mib_files.Strange, *UNREADABLE) as fault:
        raise AnalysisError(
            f"can not write {path}: {fault}; change or remove what it names, since no reader takes it"
        ) from None
    return write_text(path, text, AnalysisError)


def circuit_of(given: nx.DiGraph | str | Path) -> nx.DiGraph:
    """A graph as it is, or the graph of a file."""
    return given if isinstance(given, nx.DiGraph) else read_circuit(given)


@checked
def read_circuit(path: str | Path, *, every_edge: bool = False) -> nx.DiGraph:
    """The graph of a file that `write_circuit` wrote, in any of its forms, or of a result printed as JSON.

    A file of the benchmark MIB gives the edges that are in its graph, and all edges where it has none or all of them
    there; `every_edge` gives all with their scores in any case.

    The file is checked: AnalysisError with the reason where it is too large, declares entities or types, or holds
    names, kinds or values that no circuit has.

    >>> import headwater as hw
    >>> import networkx, tempfile
    >>> graph = networkx.DiGraph()
    >>> graph.add_node("5.1", kind="head", layer=5, head=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     hw.analyses.read_circuit(hw.analyses.write_circuit(graph, f"{folder}/circuit.json")).nodes["5.1"]
    {'kind': 'head', 'layer': 5, 'head': 1}
    """
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise AnalysisError(
            f"a circuit is a networkx.DiGraph, or a file of write_circuit; got an object of {kind}"
        )
    path = as_path(path, AnalysisError)
    form = _form(path)
    content = read_bytes(path, MOST_BYTES, AnalysisError, "give a smaller graph")
    try:
        if path.suffix == ".safetensors":
            return _mib_files.graph_of(_mib_files.of_tensors(content), every_edge)
        found = _parsed(as_text(content, "it", _Strange), form, every_edge)
        if not isinstance(found, nx.DiGraph) or found.is_multigraph():
            raise _Strange("it has no directions")
        _hold(found)
        # files of older versions write "mlp 3"
        found = nx.relabel_nodes(found, {name: name.replace("mlp ", "mlp.", 1) for name in found})
    except (_Strange, _mib_files.Strange) as fault:
        raise AnalysisError(f"{path} is not a graph that write_circuit wrote: {fault}") from None
    except UNREADABLE:
        raise AnalysisError(f"{path} is not a graph that write_circuit wrote") from None
    return Graph(found)


class _Strange(Exception):
    """The file holds something that no circuit has."""


def _parsed(text: str, form: Form, every_edge: bool) -> nx.Graph:
    if form == "graphml":
        if declared := [word for word in ("<!DOCTYPE", "<!ENTITY") if word in text]:
            raise _Strange(f"{declared[0]} is not taken, since entities can grow without end")
        found = nx.parse_graphml(text)
        for added in ("node_default", "edge_default"):  # added by networkx' reader
            found.graph.pop(added, None)
        return found
    content = parse_json(text, "it", _Strange)
    if not isinstance(content, dict):
        raise _Strange("it is no JSON object")
    if "cfg" in content:
        return _mib_files.graph_of(_mib_files.of_json(content), every_edge)
    if "metadata" in content:
        return _of_viewer(content)
    return nx.node_link_graph(content, edges="links")


def _hold(graph: nx.DiGraph) -> None:
    """Refuse names, kinds and values that no circuit has. `_Strange` says which."""
    for name, about in graph.nodes(data=True):
        shown = repr(name)[:60]
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
            raise _Strange(f"node {shown} is not named by a text of 1 to {LONGEST_NAME} signs")
        if about.get("kind") not in NODE_TYPES:
            known = ", ".join(NODE_TYPES)
            raise _Strange(f"node {shown} is of kind {str(about.get('kind'))[:40]!r}; there are {known}")
        for what in {"head": ("layer", "head"), "mlp": ("layer",), "cross": ("layer",)}.get(
            about["kind"], ()
        ):
            number = about.get(what)
            # nodes of MLPs in a trace have no layer attribute in files of older versions
            if number is None and about["kind"] == "mlp":
                continue
            if type(number) is not int or number < 0:
                raise _Strange(f"node {shown} has {what}={str(number)[:40]!r}, not a whole number from 0")
        _hold_values(f"node {shown}", about)
    for u, v, about in graph.edges(data=True):
        if about.get("kind") not in EDGE_TYPES:
            raise _Strange(
                f"edge {u!r:.60} → {v!r:.60} is of kind {str(about.get('kind'))[:40]!r}; there are edge, inside"
            )
        _hold_values(f"edge {u!r:.60} → {v!r:.60}", about)
    _hold_values("the graph", graph.graph)


def _hold_values(what: str, about: dict[Any, Any]) -> None:
    for name, value in about.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float | None):
            raise _Strange(
                f"{what} holds {str(name)[:40]!r} of type {type(value).__name__}, not a text or a number"
            )
        if name not in NUMBERS or value is None:
            continue
        if isinstance(value, str | bool) or not math.isfinite(value):
            raise _Strange(f"{what} has {name}={str(value)[:40]!r}, not a finite number")


def as_neuronpedia(graph: nx.DiGraph) -> dict[str, Any]:
    """`metadata`, `nodes` and `links` with weights, under the names of attribution graph viewers."""
    told = dict(graph.graph)
    nodes = []
    for name, about in graph.nodes(data=True):
        kind = str(about.get("kind", "node"))
        nodes.append(
            {
                "node_id": name, "jsNodeId": name, "clerp": name, "feature_type": NODE_TYPES.get(kind, kind),
                "layer": str(about.get("layer", "E" if kind == "embed" else "")), "influence": about.get("score"),
                "headwater": about,
            }
        )  # fmt: skip
    links = [
        {"source": u, "target": v, "weight": about.get("score", about.get("weight", 1.0)), "headwater": about}
        for u, v, about in graph.edges(data=True)
    ]
    metadata = {"slug": "headwater", "scan": told.get("model", ""), "prompt_tokens": [], "headwater": told}
    return {"metadata": metadata, "qParams": {}, "nodes": nodes, "links": links}


def _of_viewer(content: dict[str, Any]) -> nx.DiGraph:
    graph = Graph()
    graph.graph.update(content["metadata"]["headwater"])
    for node in content["nodes"]:
        graph.add_node(node["node_id"])
        graph.nodes[node["node_id"]].update(node["headwater"])
    for link in content["links"]:
        ends = link["source"], link["target"]
        if missing := [end for end in ends if end not in graph]:
            raise _Strange(f"an edge names {str(missing[0])[:60]!r}, which is no node")
        graph.add_edge(*ends)
        graph.edges[ends].update(link["headwater"])
    return graph


def _form(path: Path) -> Form:
    if path.suffix == ".pt":
        raise AnalysisError(
            f"{path.name} is a pickle, which can run code; keep its tensors in a .safetensors file, as "
            "docs/analyses/circuits.md does in three lines"
        )
    if path.suffix not in ENDINGS:
        raise AnalysisError(f"{path.name} ends in none of {', '.join(ENDINGS)}; give one of these endings")
    return {".graphml": "graphml", ".json": "json"}.get(path.suffix, "mib")  # type: ignore[return-value]
