"""The look that every figure shares: colour scales, margins and the size of letters.

Viridis (one number per head) and Blues (attention) grow evenly in lightness and stay readable without colour
vision; red–blue is kept for signed differences, always symmetric about zero.
"""

from __future__ import annotations

import plotly.graph_objects as go

SEQUENTIAL = "Viridis"
ATTENTION = "Blues"
DIVERGING = "RdBu_r"
BEFORE, AFTER, CHOSEN, INK = "#5b7083", "#d1603d", "#e4572e", "#2b3440"


def finish(figure: go.Figure, title: str, subtitle: str = "", height: int = 420) -> go.Figure:
    """Give the figure its title, its size and room for token labels."""
    heading = {
        "text": title,
        "x": 0,
        "xanchor": "left",
        "xref": "container",
        "yref": "container",
        "y": 0.98,
        "yanchor": "top",
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
    figure.update_layout(font={"color": INK, "size": 12})
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(tickfont={"color": INK}, title_font={"color": INK})
    return figure
