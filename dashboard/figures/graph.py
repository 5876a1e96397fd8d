"""A circuit or a trace as a figure: nodes by layer from left to right, edges by weight, everything named on hover."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

import networkx as nx
import numpy as np
import plotly.graph_objects as go

from headwater.dashboard.figures.assemble import View, assemble, wrapped
from headwater.dashboard.figures.labels import escaped
from headwater.dashboard.figures.panels import note
from headwater.dashboard.figures.style import AFTER, BEFORE, finish

MOST_EDGES = 200  # the strongest; more are a grey cloud
MOST_NAMES = 40  # nodes that carry their name, those with the strongest edges; every node has it on hover
LAYER = re.compile(r"(\d+)\.|(?:mlp|residual|block)\D*(\d+)")


def circuit_graph(graph: nx.Graph, title: str) -> go.Figure:
    """Edges from low layers to high ones, the widest with the largest |weight|, red where it is negative.

    The edge attribute that is drawn is "score", "weight" or the first number an edge has. An edge whose number is
    undefined or infinite is left out and counted. A graph without edges gives a figure that says so.
    """
    name, title = _weight_of(graph), escaped(title)
    values = [(begin, end, _number(data, name)) for begin, end, data in graph.edges(data=True)]
    finite = [edge for edge in values if math.isfinite(edge[2])]
    edges = sorted(finite, key=lambda edge: -abs(edge[2]))[:MOST_EDGES]
    left = f"{len(values) - len(finite)} edges have no finite {name}" if len(finite) < len(values) else ""
    if not edges:
        told = left or f"the graph has no edges; nodes: {graph.number_of_nodes()}"
        return assemble([View("", [note(told)])], title)
    kept = dict.fromkeys(node for edge in edges for node in edge[:2])
    place = _places([str(node) for node in kept])
    largest = max(abs(edge[2]) for edge in edges) or 1.0
    figure = go.Figure()
    says = "" if not name else "<br>" + escaped(name).replace("{", "{{").replace("}", "}}") + " {:.4g}"
    for begin, end, value in reversed(edges):
        (x0, y0), (x1, y1) = place[str(begin)], place[str(end)]
        figure.add_trace(
            go.Scatter(
                x=[x0, (x0 + x1) / 2, x1], y=[y0, (y0 + y1) / 2, y1], mode="lines", showlegend=False,
                line={"width": 0.5 + 4 * abs(value) / largest, "color": AFTER if value < 0 else BEFORE}, opacity=0.6,
                text=f"{escaped(str(begin))} → {escaped(str(end))}{says.format(value)}", hoverinfo="text",
            )
        )  # fmt: skip
    across, down = np.array([place[str(node)] for node in kept]).T
    names = [escaped(str(node)) for node in kept]  # the nodes of the strongest edges come first
    figure.add_trace(
        go.Scatter(
            x=across, y=down, mode="markers+text", textposition="top center", textfont={"size": 10},
            text=[name if i < MOST_NAMES else "" for i, name in enumerate(names)],
            customdata=names, hovertemplate="%{customdata}<extra></extra>",
            marker={"size": 7, "color": BEFORE}, showlegend=False,
        )
    )  # fmt: skip
    last = max(place[str(node)][0] for node in kept)
    ticks = sorted({float(x) for x, _ in place.values() if x == int(x)})
    ticks = ticks[:: max(1, len(ticks) // 24)]
    words = ["in" if x < 0 else f"{x:g}" for x in ticks]
    figure.update_xaxes(
        title="layer",
        showgrid=False,
        zeroline=False,
        tickvals=ticks,
        ticktext=words,
        range=[min(across) - 0.6, last + 0.6],
    )
    figure.update_yaxes(visible=False)
    unit, by = str(graph.graph.get("unit", "")), f" by |{escaped(name)}|"
    cut = len(finite) > len(edges)
    told = [f"the {len(edges)} strongest of {len(finite)} edges{by}" if cut else by.strip()]
    if not name:
        told = [f"{len(edges)} of {len(finite)} edges" if cut else "the edges carry no number"]
    told += [left] if left else []
    told += ["red is negative"] if any(value < 0 for *_, value in edges) else []
    told += [f"unit: {escaped(unit)}"] if unit else []
    return finish(figure, wrapped(title), wrapped(" · ".join(told), 110), height=620)


def _weight_of(graph: nx.Graph) -> str:
    found = [key for _, _, data in graph.edges(data=True) for key, value in data.items() if _is_number(value)]
    return str(next((key for key in ("score", "weight", *found) if key in found), ""))


def _number(data: Mapping[Any, Any], name: str) -> float:
    """What an edge weighs; 0 where it has no such number."""
    value = data.get(name)
    return float(value) if _is_number(value) else 0.0  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)  # numpy's numbers too


def _places(nodes: list[str]) -> dict[str, tuple[float, float]]:
    """x is the layer a node's name tells (before the first for inputs, behind the last for what has no number)."""
    layers = {}
    for node in nodes:
        told = LAYER.search(node)
        number = None if told is None else float(next(part for part in told.groups() if part))
        mlp = 0.5 if number is not None and "mlp" in node else 0.0
        layers[node] = (
            -1.0 if node.startswith(("embed", "input", "token")) else None if number is None else number + mlp
        )
    last = max((layer for layer in layers.values() if layer is not None), default=0.0) + 1
    columns: dict[float, int] = {}
    place = {}
    for node in nodes:
        known = layers[node]
        layer = last if known is None else known
        row = columns[layer] = columns.get(layer, 0) + 1
        place[node] = (layer, float(row // 2 * (1 if row % 2 else -1)))
    return place
