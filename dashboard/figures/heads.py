"""One number per head as a layers × heads map in which every cell can be clicked."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headwater.dashboard.figures.style import DIVERGING, SEQUENTIAL, click_layer, finish, heat, outline
from headwater.dashboard.figures.values import limits_of


def head_grid(
    values: xr.DataArray,
    title: str,
    unit: str = "",
    limits: tuple[float, float] | None = None,
    chosen: tuple[int, int] | None = None,
    subtitle: str = "",
) -> go.Figure:
    """Map of ``values`` [layer, head]; ``limits`` fixes the colour scale, ``chosen`` outlines (layer, head).

    The layers stand in a row by their numbers: layers 1 and 3 of a model are neighbours, with nothing between them.
    Without ``limits`` the colours run from zero, or symmetrically about zero where a number is negative.

    A heat map reports no click, so a layer of unseen square markers lies on top of it and carries both the hover
    text and the click. Missing layers and NaN cells stay empty.
    """
    grid = values.transpose("layer", "head").values.astype(float)
    layers = values["layer"].values if "layer" in values.coords else np.arange(grid.shape[0])
    heads = values["head"].values if "head" in values.coords else np.arange(grid.shape[1])
    found, colours = limits_of(grid)
    if limits is not None:
        colours = DIVERGING if limits[0] < 0 else SEQUENTIAL
    across, down = np.meshgrid(heads, layers)
    shown = ["no value" if np.isnan(value) else f"{value:.4g}" for value in grid.ravel()]
    hover = f"head %{{y}}.%{{x}}<br>%{{customdata}} {unit}<extra></extra>"
    figure = go.Figure(
        [
            heat(
                grid,
                limits or found,
                colours,
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
        places = [
            list(axis).index(number)
            for axis, number in ((heads, chosen[1]), (layers, chosen[0]))
            if number in axis
        ]
        if len(places) == 2:
            outline(figure, *places)
    figure.update_xaxes(
        title="head", type="category", dtick=max(1, len(heads) // 16), showgrid=False, zeroline=False,
        range=[-0.5, len(heads) - 0.5], tickangle=0,
    )  # fmt: skip
    figure.update_yaxes(
        title="layer", type="category", dtick=max(1, len(layers) // 24), showgrid=False, zeroline=False,
        range=[len(layers) - 0.5, -0.5],
    )  # fmt: skip
    height = min(760, 150 + (60 if len(layers) < 7 else 44 if len(layers) < 13 else 26) * len(layers))
    finish(figure, title, subtitle, height=max(height, 260))
    return figure.update_layout(hoverdistance=-1, dragmode=False)
