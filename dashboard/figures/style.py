"""The look that every figure shares: colour scales, margins and the size of letters.

Viridis (one number per head) and Blues (attention) grow evenly in lightness and stay readable without colour
vision; red–blue is kept for signed differences, always symmetric about zero. The ground is clear and letters have no
colour of their own, so that both follow the page, light or dark; INK is for letters on a cell that has a colour.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

SEQUENTIAL = "Viridis"
ATTENTION = "Blues"
DIVERGING = "RdBu_r"
# over a photograph: clear where little is, bright where much is
VEIL = [
    [0, "rgba(20,11,53,0.25)"],
    [0.35, "rgba(148,38,103,0.6)"],
    [0.7, "rgba(237,105,37,0.75)"],
    [1, "rgba(252,255,164,0.9)"],
]
BEFORE, AFTER, CHOSEN, INK = "#5b7083", "#d1603d", "#e4572e", "#2b3440"
GREY = "#8a949e"  # readable on a light and on a dark ground
BARS = AFTER
WIDE = "wide"  # layout.meta of a figure with words side by side: a narrow screen scrolls it
# told apart without colour vision (Okabe & Ito 2008)
SEVERAL = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#7f7f7f", "#b8a800", "#7b3294", "#1b9e77",
)  # fmt: skip


def heat(
    z: np.ndarray, limits: tuple[float | None, float | None], colours: Any, unit: str, **more: Any
) -> go.Heatmap:
    """Cells whose colours run over ``limits``, with a narrow scale named after the unit."""
    bar = {"title": {"text": unit, "side": "right"}, "thickness": 14}
    return go.Heatmap(z=z, zmin=limits[0], zmax=limits[1], colorscale=colours, colorbar=bar, **more)


def click_layer(x: np.ndarray, y: np.ndarray, size: int, **more: Any) -> go.Scatter:
    """Unseen squares over the cells of a heat map, which reports no click: they carry hover text and click."""
    unseen = {"marker": {"opacity": 0}}
    return go.Scatter(
        x=x, y=y, marker={"symbol": "square", "size": size, "opacity": 0}, showlegend=False,
        selected=unseen, unselected=unseen, **more,
    )  # fmt: skip


def outline(figure: go.Figure, x: float, y: float, wide: float = 0.5, high: float = 0.5) -> None:
    """Mark the cell at (x, y) as the chosen one."""
    line = {"color": CHOSEN, "width": 3}
    figure.add_shape(type="rect", x0=x - wide, x1=x + wide, y0=y - high, y1=y + high, line=line)


def title_place(title: str, height: int) -> float:
    """Where a title stands, as a fraction of the height: plotly hangs it up by its last line."""
    return 1 - (10 + 20 * title.count("<br>")) / height


def finish(figure: go.Figure, title: str, subtitle: str = "", height: int = 420) -> go.Figure:
    """Give the figure its title, its size and room for token labels."""
    heading = {
        "text": title,
        "x": 0,
        "xanchor": "left",
        "xref": "container",
        "yref": "container",
        "y": title_place(title, height),
        "yanchor": "top",
        "pad": {"l": 8},
        "font": {"size": 16},
    }
    if subtitle:
        heading["subtitle"] = {"text": subtitle, "font": {"size": 12}}
    figure.update_layout(
        title=heading,
        height=height,
        margin={"l": 10, "r": 10, "t": 70 if subtitle else 50, "b": 10},
        hovermode="closest",
        dragmode="zoom",
        plot_bgcolor="rgba(0,0,0,0)",
        uirevision="keep",
    )
    # no colour of letters: a page gives its own, light or dark, and a notebook that of its template
    return figure.update_layout(font={"size": 12})
