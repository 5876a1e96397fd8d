"""Where attention drains: shares by layer and position, heads by share and value, shares over generated text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headwater.dashboard.figures.labels import ticks, token_label
from headwater.dashboard.figures.style import (
    ATTENTION,
    CHOSEN,
    DIVERGING,
    click_layer,
    finish,
    heat,
)
from headwater.dashboard.figures.values import limits_of

GREY = "#8a949e"
MOST_HATCHED = 6000  # cells


def share_map(
    values: np.ndarray, few: np.ndarray, tokens: Sequence[str], places: Sequence[int], layers: Sequence[int],
    title: str, unit: str, *, subtitle: str = "", chosen: Sequence[int] = (),
) -> go.Figure:  # fmt: skip
    """Layers down, positions across, of `values` [layer, position]; cells of `few` are hatched and have no colour.

    A click reports the position. `chosen` positions have a mark above them.
    """
    grid = np.where(few, np.nan, values)[:, places]
    hatched = few[:, places]
    limits, _ = limits_of(grid)
    signed = limits[0] < 0
    names = [token_label(tokens[place], place) for place in places]
    down, across = np.indices(grid.shape).reshape(2, -1)
    told = [
        f"{names[x]}, layer {layers[y]}<br>"
        + (
            f"seen by few: {values[y, places[x]]:.3f}"
            if hatched[y, x]
            else f"{grid[y, x]:.4f} {unit}"
            if np.isfinite(grid[y, x])
            else "no value"
        )
        for y, x in zip(down.tolist(), across.tolist(), strict=True)
    ]
    figure = go.Figure(
        [
            heat(
                grid, limits, DIVERGING if signed else ATTENTION, unit, hoverinfo="skip",
                xgap=1 if len(places) < 120 else 0, ygap=1,
            ),
            click_layer(
                across, down, 12, mode="markers", customdata=np.asarray(places)[across], hovertext=told,
                hovertemplate="%{hovertext}<extra></extra>",
            ),
        ]
    )  # fmt: skip
    y, x = np.nonzero(hatched)
    if 0 < len(x) <= MOST_HATCHED:
        figure.add_trace(
            go.Scatter(
                x=x, y=y, mode="markers", hoverinfo="skip", showlegend=False,
                marker={"symbol": "line-ne-open", "size": 9, "color": GREY, "line": {"width": 1}},
            )
        )  # fmt: skip
    marked = [k for k, place in enumerate(places) if place in chosen]
    figure.add_trace(
        go.Scatter(
            x=marked, y=[-0.85] * len(marked), mode="markers", hoverinfo="skip", showlegend=False,
            marker={"symbol": "triangle-down", "size": 12, "color": CHOSEN},
        )
    )  # fmt: skip
    at, _ = ticks([tokens[place] for place in places], range(len(places)))
    figure.update_xaxes(
        tickvals=at,
        ticktext=names,
        tickangle=-60,
        range=[-0.5, len(places) - 0.5],
        showgrid=False,
        zeroline=False,
    )
    step = max(1, len(layers) // 24)
    figure.update_yaxes(
        title="layer", tickvals=list(range(0, len(layers), step)), ticktext=[str(n) for n in layers[::step]],
        range=[len(layers) - 0.5, -1.3], showgrid=False, zeroline=False,
    )  # fmt: skip
    finish(figure, title, subtitle, height=int(np.clip(190 + 30 * len(layers), 280, 720)))
    return figure.update_layout(hoverdistance=-1, dragmode=False)


def share_and_norm(
    share: xr.DataArray, norm: np.ndarray, limit: float, title: str, subtitle: str
) -> go.Figure:
    """A point per head: the share that the sink receives, and how long its value is against the others'."""
    layers, heads = share["layer"].values, np.arange(share.sizes["head"])
    layer, head = (each.ravel() for each in np.meshgrid(layers, heads, indexing="ij"))
    x, y = share.values.ravel(), norm.ravel()
    figure = go.Figure(
        go.Scatter(
            x=x, y=y, mode="markers", customdata=np.column_stack([layer, head]),
            marker={"size": 10, "color": layer, "colorscale": "Viridis", "line": {"width": 1, "color": GREY},
                    "colorbar": {"title": {"text": "layer", "side": "right"}, "thickness": 14}},
            hovertemplate="head %{customdata[0]}.%{customdata[1]}<br>share %{x:.3f}<br>value %{y:.3f} × the others'"
            "<extra></extra>",
        )
    )  # fmt: skip
    line = {"color": GREY, "dash": "dot", "width": 1}
    figure.add_vline(x=limit, line=line)
    figure.add_hline(y=1, line=line)
    figure.update_xaxes(title="share received", rangemode="tozero")
    figure.update_yaxes(title="length of its value ÷ the others'", rangemode="tozero")
    finish(figure, title, subtitle, height=420)
    return figure.update_layout(dragmode=False)


def over_steps(mass: xr.DataArray, tokens: Sequence[str], first: int, title: str) -> go.Figure:
    """The weight on the sinks of each query, layer by layer; new tokens stand right of the line."""
    grid = mass.transpose("layer", "query").values
    layers = mass["layer"].values
    figure = go.Figure(
        heat(
            grid, (0.0, float(np.nanmax(grid, initial=1e-6))), ATTENTION, "weight", y=[str(n) for n in layers],
            text=np.tile([token_label(token, i) for i, token in enumerate(tokens)], (len(layers), 1)),
            hovertemplate="%{text}, layer %{y}<br>%{z:.4f} on the sinks<extra></extra>",
        )
    )  # fmt: skip
    figure.add_vline(x=first - 0.5, line={"color": CHOSEN, "width": 2})
    at, names = ticks(tokens, np.arange(len(tokens)))
    figure.update_xaxes(tickvals=at, ticktext=names, tickangle=-60, showgrid=False)
    figure.update_yaxes(title="layer", type="category", autorange="reversed", dtick=max(1, len(layers) // 24))
    return finish(figure, title, height=int(np.clip(200 + 26 * len(layers), 280, 700)))
