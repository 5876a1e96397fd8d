"""One number per token: a strip of tokens that can be clicked, and bars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from headwater.dashboard.figures.labels import cut, escaped, short, ticks, token_label
from headwater.dashboard.figures.style import (
    ATTENTION,
    BEFORE,
    GREY,
    INK,
    WIDE,
    click_layer,
    finish,
    heat,
    outline,
)

PER_ROW = 12
MOST_IN_A_STRIP = 240


def token_strip(
    values: np.ndarray,
    tokens: Sequence[str],
    title: str,
    unit: str = "",
    limits: tuple[float, float] | None = (0.0, 1.0),
    chosen: int | None = None,
    subtitle: str = "",
) -> go.Figure:
    """The prompt as written, each token on a cell whose colour is its value; a click reports its position.

    Without ``limits`` the colours run from 0 to the largest value.
    """
    values = np.asarray(values, dtype=np.float32)
    limits = limits or (0.0, float(np.nanmax(values, initial=1e-6)))
    count = len(tokens)
    columns = min(PER_ROW, max(count, 1))
    rows = -(-count // columns)
    cells = np.full(rows * columns, np.nan, dtype=np.float32)
    cells[:count] = values
    place = np.arange(count)
    shown = ["no value" if np.isnan(value) else f"{value:.4f} {unit}" for value in values]
    dark = (values - limits[0]) / (limits[1] - limits[0]) > 0.55
    # a cell without a value is clear: its letters stand on the page itself
    inks = [GREY if np.isnan(value) else "#fff" if dark[n] else INK for n, value in enumerate(values)]
    x, y = place % columns, place // columns
    figure = go.Figure(
        [
            heat(cells.reshape(rows, columns), limits, ATTENTION, unit, xgap=3, ygap=4, hoverinfo="skip"),
            click_layer(
                x, y, 10, mode="markers+text", customdata=place, textposition="middle center",
                text=[escaped(cut(short(token), 11)) for token in tokens],
                textfont={"color": inks, "size": 12},
                hovertext=[f"{token_label(token, i)}<br>{shown[i]}" for i, token in enumerate(tokens)],
                hovertemplate="%{hovertext}<extra></extra>",
            ),
        ]
    )  # fmt: skip
    if chosen is not None:
        outline(figure, x[chosen], y[chosen], 0.49, 0.47)
    figure.update_xaxes(visible=False, range=[-0.5, columns - 0.5])
    figure.update_yaxes(visible=False, range=[rows - 0.5, -0.5])
    finish(figure, title, subtitle, height=90 + 46 * rows)
    return figure.update_layout(hoverdistance=-1, dragmode=False, meta=WIDE)


def token_bars(
    values: np.ndarray, tokens: Sequence[str], title: str, unit: str, subtitle: str = ""
) -> go.Figure:
    """One bar per token."""
    place = np.arange(len(tokens))
    figure = go.Figure(
        go.Bar(
            x=place, y=np.asarray(values, dtype=np.float32), name=unit, marker_color=BEFORE,
            hovertemplate=f"%{{x}}<br>{unit} %{{y:.4f}}<extra></extra>",
        )
    )  # fmt: skip
    places, text = ticks(tokens, place)
    figure.update_xaxes(
        tickvals=places, ticktext=text, tickangle=-60, range=[-0.6, len(tokens) - 0.4], showgrid=False
    )
    figure.update_yaxes(title=unit, rangemode="tozero")
    return finish(figure, title, subtitle, height=360)
