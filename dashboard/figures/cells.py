"""The cells of a query × key map and its token axes, shared by attention maps and maps of change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from headwater.dashboard.figures.labels import ticks
from headwater.dashboard.figures.pooling import Pooled
from headwater.dashboard.figures.style import heat


def cells(
    pooled: Pooled, first: tuple[int, int], colours: str, limits: tuple[float, float], word: str
) -> go.Heatmap:
    """Heat map of a pooled or exact map whose first cell is at positions ``first`` = (query, key)."""
    hover = f"query %{{y}}<br>key %{{x}}<br>{word} %{{z:.4f}}<extra></extra>"
    pair = None
    if pooled.is_pooled:  # the pair behind a pooled cell; an exact cell is named by its axes, at no cost
        pair = np.stack([pooled.query + first[0], pooled.key + first[1]], axis=-1)
        hover = (
            f"largest {word} of the block: %{{z:.4f}}<br>query %{{customdata[0]}}, key %{{customdata[1]}}"
            "<extra></extra>"
        )
    return heat(pooled.cells, limits, colours, word, customdata=pair, hovertemplate=hover)


def token_axes(
    figure: go.Figure,
    pooled: Pooled,
    tokens: tuple[Sequence[str], Sequence[str]],
    first: tuple[int, int],
    **place: Any,
) -> None:
    """Integer axes with token labels, so that equal tokens stay separate rows and columns."""
    rows, columns = pooled.cells.shape
    plain: dict[str, Any] = {"showgrid": False, "zeroline": False, **place}
    values, text = _ticks(tokens[0], first[0], rows, pooled.block)
    shown = {"tickvals": values, "ticktext": text, "title": "query (attends)", "range": [rows - 0.5, -0.5]}
    figure.update_yaxes(**shown, **plain)
    values, text = _ticks(tokens[1], first[1], columns, pooled.block, 32)
    shown |= {
        "tickvals": values,
        "ticktext": text,
        "title": "key (attended to)",
        "range": [-0.5, columns - 0.5],
    }
    figure.update_xaxes(autotickangles=[-45, -90], **shown, **plain)


def _ticks(
    tokens: Sequence[str], first: int, count: int, block: int, most: int = 48
) -> tuple[list[int], list[str]]:
    """Ticks for ``count`` cells, each named by the first token of its block."""
    starts = np.arange(count) * block
    return ticks([tokens[int(start)] for start in starts], starts + first, most)
