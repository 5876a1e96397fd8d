"""Graphs in files: GraphML, JSON in networkx' node-link form, and JSON as circuit viewers like Neuronpedia's read it.

All three are read back with every attribute they hold; the viewers' form holds nodes, edges and scores under its own
names, and what it has no name for beside them. Files are text, and nothing in them is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal
from xml.etree.ElementTree import ParseError

import networkx as nx

from headwater.lens.errors import AnalysisError

Form = Literal["graphml", "json", "neuronpedia"]
MOST_BYTES = 256 * 2**20
NODE_TYPES = {
    "embed": "embedding",
    "logits": "logit",
    "mlp": "mlp",
    "head": "attention head",
    "input": "head input",
}


def write_circuit(graph: nx.DiGraph, path: str | Path, form: Form | None = None) -> Path:
    """Write a graph to `path`; the form goes by the ending (.graphml or .json) unless it is said."""
    path = Path(path)
    form = _form(path) if form is None else form
    if form == "graphml":
        text = "\n".join(nx.generate_graphml(graph))
    elif form == "json":
        text = json.dumps(nx.node_link_data(graph, edges="links"), indent=1)
    elif form == "neuronpedia":
        text = json.dumps(as_neuronpedia(graph), indent=1)
    else:
        raise AnalysisError(f"form={form!r} is unknown; give graphml, json or neuronpedia")
    path.write_text(text, encoding="utf-8")
    return path


def read_circuit(path: str | Path) -> nx.DiGraph:
    """The graph of a file that `write_circuit` wrote, in any of its forms."""
    path = Path(path)
    form = _form(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise AnalysisError(f"{path} is larger than {MOST_BYTES // 2**20} MiB; give a smaller graph")
        text = path.read_text(encoding="utf-8")
        if form == "graphml":
            found = nx.parse_graphml(text)
        else:
            content = json.loads(text)
            found = (
                _of_viewer(content) if "metadata" in content else nx.node_link_graph(content, edges="links")
            )
    except OSError as error:
        raise AnalysisError(
            f"{path} can not be read: {error.strerror}; give a file of write_circuit"
        ) from None
    except (ValueError, KeyError, TypeError, ParseError, nx.NetworkXException):
        raise AnalysisError(f"{path} is not a graph that write_circuit wrote") from None
    if not isinstance(found, nx.DiGraph) or found.is_multigraph():
        raise AnalysisError(f"{path} holds a graph without directions; give one of write_circuit")
    return found


def as_neuronpedia(graph: nx.DiGraph) -> dict[str, Any]:
    """`metadata`, `nodes` and `links` with weights, under the names that viewers of attribution graphs use."""
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
    graph = nx.DiGraph(**content["metadata"]["headwater"])
    for node in content["nodes"]:
        graph.add_node(node["node_id"], **node["headwater"])
    for link in content["links"]:
        graph.add_edge(link["source"], link["target"], **link["headwater"])
    return graph


def _form(path: Path) -> Form:
    if path.suffix not in (".graphml", ".json"):
        raise AnalysisError(f"{path.name} ends in neither .graphml nor .json; give one of these endings")
    return "graphml" if path.suffix == ".graphml" else "json"
