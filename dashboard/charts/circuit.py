"""A circuit as a layered graph: layers upwards; tokens, or heads, from left to right; edges by weight.

Nodes and the middles of edges are points that report a click: `customdata` is ["node", name] or ["edge", number].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from headwater.dashboard.figures.labels import cut, escaped, visible
from headwater.dashboard.figures.style import AFTER, BEFORE, CHOSEN, finish

GREY = "#8a949e"  # readable on a light and on a dark ground
NODE = "#2f7fb8"
CURVE = np.linspace(0, 1, 13)
MOST_NAMES = 60
HIGHEST = 1100


def circuit_layers(
    edges: pd.DataFrame,
    layers: int,
    n_heads: int,
    tokens: Sequence[str],
    title: str,
    unit: str,
    *,
    subtitle: str = "",
    chosen: int | None = None,
    pinned: Collection[str] = (),
    groups: Mapping[str, Sequence[str]] = {},
) -> go.Figure:
    """Edges with columns sender, reader, input and weight; node names as "1.3@14", "1.3", "mlp.2", "embed", "logits".

    Where nodes have positions (behind @), the columns are tokens, else head numbers. A group stands in the middle of
    its nodes. `chosen` is the number of the edge that is marked.
    """
    names = list(dict.fromkeys([*edges["sender"], *edges["reader"]]))
    place, columns = _places(names, layers, n_heads, groups)
    largest = cast("float", edges["weight"].abs().max()) if len(edges) else 1.0
    figure = go.Figure()
    middles, hovers, colours = [], [], []
    lines = zip(edges["sender"], edges["reader"], edges["input"], edges["weight"], strict=True)
    for number, (sender, reader, of_reader, weight) in list(enumerate(lines))[::-1]:
        (x0, y0), (x1, y1) = place[sender], place[reader]
        bend = 0.18 * (x1 - x0) if x1 != x0 else 0.22
        x = x0 + (x1 - x0) * CURVE + (bend if x1 == x0 else 0) * np.sin(np.pi * CURVE)
        y = y0 + (y1 - y0) * (3 * CURVE**2 - 2 * CURVE**3)
        marked = number == chosen
        colour = CHOSEN if marked else AFTER if weight < 0 else BEFORE
        width = 1 + 5 * abs(weight) / (largest or 1.0)
        figure.add_trace(
            go.Scatter(
                x=x, y=y, mode="lines", showlegend=False, hoverinfo="skip", opacity=1 if marked else 0.55,
                line={"width": width, "color": colour},
            )
        )  # fmt: skip
        middles.append((x[6], y[6], number))
        colours.append(colour)
        into = f".{of_reader}" if of_reader else ""
        hovers.append(f"{escaped(sender)} → {escaped(reader)}{into}<br>{weight:.4g} {escaped(unit)}")
    if middles:
        across, up, numbers = (list(each) for each in zip(*middles, strict=True))
        figure.add_trace(
            go.Scatter(
                x=across, y=up, mode="markers", showlegend=False, text=hovers, hoverinfo="text", name="edges",
                customdata=[["edge", number] for number in numbers],
                marker={"size": 9, "color": colours, "opacity": 0.75, "symbol": "diamond"},
                selected={"marker": {"opacity": 0.75}}, unselected={"marker": {"opacity": 0.75}},
            )
        )  # fmt: skip
    if names:
        across, up = np.array([place[name] for name in names]).T
        shown = [escaped(name.partition("@")[0]) if i < MOST_NAMES else "" for i, name in enumerate(names)]
        told = [_told(name, tokens, groups) for name in names]
        heads = {name.partition("@")[0] for edge in pinned for name in edge.split(">")}
        figure.add_trace(
            go.Scatter(
                x=across, y=up, mode="markers+text", text=shown, textposition="top center", showlegend=False,
                textfont={"size": 11}, hovertext=told, hoverinfo="text", name="nodes",
                customdata=[["node", name] for name in names],
                marker={
                    "size": [16 if name in groups else 11 for name in names],
                    "color": [CHOSEN if name.partition("@")[0] in heads else NODE for name in names],
                    "line": {"width": 1, "color": GREY},
                },
                selected={"marker": {"opacity": 1}}, unselected={"marker": {"opacity": 1}},
            )
        )  # fmt: skip
    ticks = [f"{place} {escaped(cut(visible(tokens[place]), 12))}" if place < len(tokens) else str(place)
             for place in columns] if columns else []  # fmt: skip
    if columns:
        figure.update_xaxes(tickvals=list(range(len(columns))), ticktext=ticks, tickangle=-45, title="token")
    else:
        figure.update_xaxes(
            tickvals=[*range(n_heads), n_heads], ticktext=[*map(str, range(n_heads)), "MLP"], title="head"
        )
    rows = sorted({int(y) for _, y in place.values() if 0 <= y < layers})
    figure.update_yaxes(
        title="layer", tickvals=[-1, *rows, layers], ticktext=["input", *map(str, rows), "answer"],
        range=[-1.6, layers + 0.7] if any(y in (-1, layers) for _, y in place.values()) else [-0.6, layers],
    )  # fmt: skip
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(zeroline=False, gridcolor="rgba(138,148,158,0.2)")
    height = min(HIGHEST, 260 + 95 * layers)
    return finish(figure, escaped(title), escaped(subtitle), height=height)


def strongest(edges: pd.DataFrame, count: int = 5) -> str:
    """What is seen, in words."""
    first = edges.head(count)
    ends = zip(first["sender"], first["reader"], first["weight"], strict=True)
    lines = [f"{sender} → {reader} {weight:.3g}" for sender, reader, weight in ends]
    return f"{len(edges)} edges; the strongest: {', '.join(lines)}" if lines else "no edges"


def _told(name: str, tokens: Sequence[str], groups: Mapping[str, Sequence[str]]) -> str:
    if name in groups:
        return f"{escaped(name)}: {escaped(', '.join(groups[name]))}"
    what, at, place = name.partition("@")
    if at and place.isdigit() and int(place) < len(tokens):
        return f"{escaped(what)} at token {place} {escaped(visible(tokens[int(place)]))}"
    return escaped(name)


def _places(
    names: Sequence[str], layers: int, n_heads: int, groups: Mapping[str, Sequence[str]]
) -> tuple[dict[str, tuple[float, float]], list[int]]:
    """x and y of each node, and the token positions that are columns; none where nodes have none."""
    singles = [node for name in names for node in groups.get(name, [name])]
    columns = sorted({int(node.partition("@")[2]) for node in singles if node.partition("@")[2].isdigit()})
    found = {node: _place(node, layers, n_heads, columns) for node in singles}
    for name in names:
        if name in groups:
            across, up = np.array([found[node] for node in groups[name]]).mean(0)
            found[name] = (float(across), float(up))
    return {name: found[name] for name in names}, columns


def _place(node: str, layers: int, n_heads: int, columns: Sequence[int]) -> tuple[float, float]:
    what, _, place = node.partition("@")
    kind, _, number = what.partition(".")
    middle = (len(columns) - 1) / 2 if columns else (n_heads - 1) / 2
    token = columns.index(int(place)) if place.isdigit() else None
    if kind.isdigit() and number.isdigit():
        if token is None:
            return float(int(number)), float(kind)
        share = (int(number) + 0.5) / n_heads - 0.5  # the heads of a layer stand side by side at their token
        return token + 0.62 * share, int(kind) + 0.5 * share
    if number.isdigit():  # mlp.3, mixer.2, cross.1
        return (float(n_heads) if token is None else token + 0.4), int(number) + 0.5
    up = -1.0 if kind.startswith(("embed", "input", "token")) else float(layers)
    return (middle if token is None else float(token)), up


def size_curve(
    sizes: Sequence[float], lines: Mapping[str, np.ndarray], chosen: float | None, title: str, unit: str = "edges"
) -> go.Figure:  # fmt: skip
    """Shares by the number of edges, or another unit, on a logarithmic axis; the chosen number is marked."""
    figure = go.Figure()
    for (name, values), colour in zip(lines.items(), (NODE, GREY), strict=False):
        figure.add_trace(
            go.Scatter(
                x=list(sizes), y=values, mode="lines+markers", name=name, line={"color": colour},
                hovertemplate=f"{name}, %{{x}} {unit}: %{{y:.3f}}<extra></extra>",
            )
        )  # fmt: skip
    if chosen is not None:
        figure.add_vline(x=chosen, line={"color": CHOSEN, "dash": "dot"})
    figure.update_xaxes(
        type="log", title=unit, zeroline=False, tickvals=list(sizes), ticktext=[f"{n:.10g}" for n in sizes]
    )
    figure.update_yaxes(title="share", zeroline=False, gridcolor="rgba(138,148,158,0.2)")
    return finish(figure, escaped(title), height=320)
