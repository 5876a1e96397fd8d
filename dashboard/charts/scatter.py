"""One point per head: two numbers as axes, the layer as its colour."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headwater.dashboard.figures.style import CHOSEN, SEQUENTIAL, finish

EDGE = "#8a929a"  # seen on a light and on a dark ground
MOST_NAMED = 6  # points with their names beside them


def head_scatter(
    across: xr.DataArray,
    up: xr.DataArray,
    names: tuple[str, str],
    chosen: tuple[int, int] | None = None,
    pins: Sequence[str] = (),
) -> go.Figure:
    """Heads by two numbers [layer, head]; those that lie farthest out are named, pinned ones are diamonds.

    Each point's customdata is its layer and head. Heads without one of the numbers are left out and counted.
    """
    layers, heads = np.meshgrid(up["layer"].values, np.arange(up.sizes["head"]), indexing="ij")
    x, y = (each.transpose("layer", "head").values.astype(float).ravel() for each in (across, up))
    known = np.isfinite(x) & np.isfinite(y)
    place = np.stack([layers.ravel(), heads.ravel()], -1)[known]
    x, y = x[known], y[known]
    label = [f"{layer}.{head}" for layer, head in place]
    near = np.argsort(-_outlying(x, y), kind="stable")[:MOST_NAMED].tolist()
    mine = [tuple(each) == chosen for each in place.tolist()]
    marker = {
        "color": place[:, 0], "colorscale": SEQUENTIAL, "size": [14 if own else 9 for own in mine],
        "symbol": ["diamond" if name in pins else "circle" for name in label],
        "line": {"width": [3 if own else 1 for own in mine], "color": [CHOSEN if own else EDGE for own in mine]},
        "colorbar": {"title": {"text": "layer", "side": "right"}, "thickness": 14, "tickformat": "d"},
    }  # fmt: skip
    if len(np.unique(place[:, 0])) < 12:
        marker["colorbar"] |= {"tickvals": np.unique(place[:, 0]).tolist()}
    figure = go.Figure(
        go.Scatter(
            x=x, y=y, mode="markers+text", marker=marker, customdata=place, textposition="top center",
            text=[name if n in near or mine[n] else "" for n, name in enumerate(label)],
            hovertemplate="head %{customdata[0]}.%{customdata[1]}<br>x %{x:.4g}<br>y %{y:.4g}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title=names[0], zeroline=True)
    figure.update_yaxes(title=names[1], zeroline=True)
    left = known.size - int(known.sum())
    told = f"{left} heads without one of the numbers are left out" if left else ""
    return finish(figure, "", told, height=430).update_layout(margin={"l": 10, "r": 10, "t": 30, "b": 10})


def _outlying(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far each point lies from the middle one, each axis by its own spread."""
    far = [np.abs(each - np.median(each)) / (each.std() or 1.0) for each in (x, y) if len(each)]
    return np.maximum(*far) if far else np.zeros(0)
