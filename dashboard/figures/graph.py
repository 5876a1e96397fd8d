"""A circuit or a trace as a figure: nodes by layer from left to right, edges by weight, everything named on hover."""

from __future__ import annotations

import re

import networkx as nx
import numpy as np
import plotly.graph_objects as go

from headwater.dashboard.figures.assemble import View, assemble, wrapped
from headwater.dashboard.figures.labels import escaped
from headwater.dashboard.figures.panels import note
from headwater.dashboard.figures.style import AFTER, BEFORE, INK, finish

MOST_EDGES = 200  # the strongest; more are a grey cloud
MOST_NAMES = 40  # nodes that carry their name, those with the strongest edges; every node has it on hover
LAYER = re.compile(r"(\d+)\.|(?:mlp|residual|block)\D*(\d+)")


def circuit_graph(graph: nx.Graph, title: str) -> go.Figure:
    """Edges from low layers to high ones, the widest with the largest |weight|, red where it is negative.

    The edge attribute that is drawn is "score", "weight" or the first number an edge has. A graph without edges gives a
    figure that says so.
    """
    name = _weight_of(graph)
    edges = sorted(graph.edges(data=True), key=lambda edge: -abs(float(edge[2].get(name, 0.0) or 0.0)))[
        :MOST_EDGES
    ]
    if not edges:
        told = f"the graph has no edges; nodes: {graph.number_of_nodes()}"
        return assemble([View("", [note(told)])], title)
    kept = dict.fromkeys(node for edge in edges for node in edge[:2])
    place = _places([str(node) for node in kept])
    largest = max(abs(float(edge[2].get(name, 0.0) or 0.0)) for edge in edges) or 1.0
    figure = go.Figure()
    for begin, end, data in reversed(edges):
        value = float(data.get(name, 0.0) or 0.0)
        (x0, y0), (x1, y1) = place[str(begin)], place[str(end)]
        figure.add_trace(
            go.Scatter(
                x=[x0, (x0 + x1) / 2, x1], y=[y0, (y0 + y1) / 2, y1], mode="lines", showlegend=False,
                line={"width": 0.5 + 4 * abs(value) / largest, "color": AFTER if value < 0 else BEFORE}, opacity=0.6,
                text=f"{escaped(str(begin))} → {escaped(str(end))}<br>{name} {value:.4g}", hoverinfo="text",
            )
        )  # fmt: skip
    across, down = np.array([place[str(node)] for node in kept]).T
    names = [escaped(str(node)) for node in kept]  # the nodes of the strongest edges come first
    figure.add_trace(
        go.Scatter(
            x=across, y=down, mode="markers+text", textposition="top center", textfont={"size": 10},
            text=[name if i < MOST_NAMES else "" for i, name in enumerate(names)],
            customdata=names, hovertemplate="%{customdata}<extra></extra>",
            marker={"size": 7, "color": INK}, showlegend=False,
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
    count, unit = graph.number_of_edges(), str(graph.graph.get("unit", ""))
    told = [
        f"the {len(edges)} strongest of {count} edges by |{name}|" if count > len(edges) else f"by |{name}|"
    ]
    told += ["red is negative"] if any(float(data.get(name, 0.0) or 0.0) < 0 for *_, data in edges) else []
    told += [f"unit: {escaped(unit)}"] if unit else []
    return finish(figure, wrapped(title), wrapped(" · ".join(told), 110), height=620)


def _weight_of(graph: nx.Graph) -> str:
    found = [
        key
        for _, _, data in graph.edges(data=True)
        for key, value in data.items()
        if isinstance(value, int | float)
    ]
    return next((key for key in ("score", "weight", *found) if key in found), "weight")


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
