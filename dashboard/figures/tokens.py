"""One number per token: a strip of tokens that can be clicked, and bars that can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from headwater.dashboard.figures.labels import cut, escaped, ticks, token_label, visible
from headwater.dashboard.figures.style import (
    AFTER,
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
                text=[escaped(cut(visible(token), 11)) for token in tokens],
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
    values: np.ndarray,
    tokens: Sequence[str],
    title: str,
    unit: str,
    *,
    after: np.ndarray | None = None,
    limit: float | None = None,
    subtitle: str = "",
) -> go.Figure:
    """One bar per token, or two where ``after`` is given (before and after an edit)."""
    place = np.arange(len(tokens))
    figure = go.Figure(
        [
            go.Bar(x=place, y=numbers, name=name, marker_color=colour,
                   hovertemplate=f"%{{x}}<br>{name} %{{y:.4f}}<extra></extra>")
            for name, numbers, colour in _series(unit, values, after)
        ]
    )  # fmt: skip
    places, text = ticks(tokens, place)
    figure.update_xaxes(
        tickvals=places, ticktext=text, tickangle=-60, range=[-0.6, len(tokens) - 0.4], showgrid=False
    )
    figure.update_yaxes(title=unit, rangemode="tozero", range=None if limit is None else [0, limit])
    figure.update_layout(
        showlegend=after is not None, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )
    return finish(figure, title, subtitle, height=360)


def next_token_bars(
    tokens: Sequence[str],
    before: np.ndarray,
    after: np.ndarray | None = None,
    title: str = "Predicted next tokens",
) -> go.Figure:
    """Probability of each candidate for the next token, most likely on top; with ``after``, in pairs."""
    places = np.arange(len(tokens))
    figure = go.Figure(
        [
            go.Bar(y=places, x=numbers, orientation="h", name=name, marker_color=colour, textposition="outside",
                   text=[f"{number:.3f}" for number in numbers], cliponaxis=False,
                   hovertemplate=f"%{{y}}<br>{name} %{{x:.4f}}<extra></extra>")
            for name, numbers, colour in _series("probability", before, after)
        ]
    )  # fmt: skip
    labels = [escaped(cut(visible(token))) for token in tokens]
    figure.update_yaxes(tickvals=places, ticktext=labels, autorange="reversed", showgrid=False)
    figure.update_xaxes(title="probability", range=[0, 1.12], tickvals=[0, 0.25, 0.5, 0.75, 1])
    figure.update_layout(
        showlegend=after is not None, legend={"orientation": "h", "y": 1.0, "yanchor": "bottom"}
    )
    return finish(figure, title, height=110 + len(tokens) * (40 if after is not None else 28))


def _series(plain: str, values: np.ndarray, after: np.ndarray | None) -> list[tuple[str, np.ndarray, str]]:
    """Name, numbers and colour of each run: one called ``plain``, or before and after an edit."""
    runs = (
        [(plain, values, BEFORE)] if after is None else [("before", values, BEFORE), ("after", after, AFTER)]
    )
    return [(name, np.asarray(numbers, dtype=np.float32), colour) for name, numbers, colour in runs]
