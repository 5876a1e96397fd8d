"""One number per head as a layers × heads map in which every cell can be clicked."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headwater.dashboard.figures.style import SEQUENTIAL, click_layer, finish, heat, outline


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
    across, down = np.meshgrid(heads, layers)
    shown = ["no value" if np.isnan(value) else f"{value:.4g}" for value in grid.ravel()]
    hover = f"head %{{y}}.%{{x}}<br>%{{customdata}} {unit}<extra></extra>"
    figure = go.Figure(
        [
            heat(
                grid,
                limits or _spread(grid),
                SEQUENTIAL,
                unit,
                x=heads,
                y=layers,
                hoverinfo="skip",
                xgap=1,
                ygap=1,
            ),
            click_layer(
                across.ravel(), down.ravel(), 8, mode="markers", customdata=shown, hovertemplate=hover
            ),
        ]
    )
    if chosen is not None:
        outline(figure, chosen[1], chosen[0])
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
