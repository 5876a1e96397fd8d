"""One number per head as a layers × heads map in which every cell can be clicked."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headwater.dashboard.figures.style import CHOSEN, SEQUENTIAL, finish


def head_grid(
    values: xr.DataArray,
    title: str,
    unit: str = "",
    limits: tuple[float, float] | None = None,
    chosen: tuple[int, int] | None = None,
) -> go.Figure:
    """Map of ``values`` [layer, head]; ``limits`` fixes the colour scale, ``chosen`` outlines (layer, head).

    A heat map reports no click, so a layer of unseen square markers lies on top of it and carries both the hover
    text and the click. Missing layers and NaN cells stay empty.
    """
    grid = values.transpose("layer", "head").values.astype(np.float32)
    layers = values["layer"].values if "layer" in values.coords else np.arange(grid.shape[0])
    heads = values["head"].values if "head" in values.coords else np.arange(grid.shape[1])
    low, high = limits or _spread(grid)
    across, down = np.meshgrid(heads, layers)
    shown = ["no value" if np.isnan(value) else f"{value:.4g}" for value in grid.ravel()]
    figure = go.Figure(
        [
            go.Heatmap(
                z=grid,
                x=heads,
                y=layers,
                zmin=low,
                zmax=high,
                colorscale=SEQUENTIAL,
                hoverinfo="skip",
                xgap=1,
                ygap=1,
                colorbar={"title": {"text": unit, "side": "right"}, "thickness": 14},
            ),
            go.Scatter(
                x=across.ravel(),
                y=down.ravel(),
                mode="markers",
                customdata=shown,
                showlegend=False,
                marker={"symbol": "square", "size": 8, "opacity": 0},
                hovertemplate=f"head %{{y}}.%{{x}}<br>%{{customdata}} {unit}<extra></extra>",
                selected={"marker": {"opacity": 0}},
                unselected={"marker": {"opacity": 0}},
            ),
        ]
    )
    if chosen is not None:
        layer, head = chosen
        figure.add_shape(
            type="rect",
            x0=head - 0.5,
            x1=head + 0.5,
            y0=layer - 0.5,
            y1=layer + 0.5,
            line={"color": CHOSEN, "width": 3},
        )
    figure.update_xaxes(
        title="head", dtick=max(1, len(heads) // 24), showgrid=False, zeroline=False, constrain="domain"
    )
    figure.update_yaxes(
        title="layer", dtick=max(1, len(layers) // 24), showgrid=False, zeroline=False, autorange="reversed"
    )
    height = min(760, 150 + (60 if len(layers) < 7 else 44 if len(layers) < 13 else 26) * len(layers))
    finish(figure, title, height=max(height, 260))
    return figure.update_layout(hoverdistance=-1, dragmode=False)


def _spread(grid: np.ndarray) -> tuple[float, float]:
    """Colour limits from the data: from zero where nothing is negative."""
    known = grid[np.isfinite(grid)]
    if not known.size:
        return 0.0, 1.0
    low, high = min(0.0, float(known.min())), float(known.max())
    return low, high if high > low else low + 1.0
