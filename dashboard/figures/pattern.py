"""One attention map with its tokens, and beside it exact margins: what each key receives, how spread each query is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from headwater.dashboard.figures.cells import cells, token_axes
from headwater.dashboard.figures.pooling import MOST_CELLS, Pooled, pool
from headwater.dashboard.figures.style import ATTENTION, BEFORE, finish


def pattern_map(
    weights: np.ndarray | Pooled,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    title: str,
    *,
    first_query: int = 0,
    first_key: int = 0,
    received: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    row_margin: bool = True,
    exclude_first: bool = False,
    most: int = MOST_CELLS,
    told: str = "",
) -> go.Figure:
    """Attention of queries (rows) to keys (columns), one cell per pair or, above ``most`` a side, per block.

    The upper margin is what each key receives (mean weight over the queries that see it), the right margin the
    entropy of each query in nats; ``row_margin=False`` leaves the right one out. Both come from the weights before
    pooling, or are given as ``received`` and ``entropy`` (a map that comes already pooled needs them).
    ``exclude_first`` lets the first key out of the colour scale and changes no number; ``told`` begins the subtitle.
    """
    first = (first_query, first_key)
    if isinstance(weights, Pooled):
        pooled = weights
    else:
        weights = np.asarray(weights, dtype=np.float32)
        pooled = pool(weights, most)
        received = _received(weights, first) if received is None else received
        entropy = _entropy(weights) if entropy is None else entropy
    high, remark = _scale(pooled, exclude_first and first_key == 0)
    if pooled.is_pooled:
        remark = f"each cell = largest weight of {pooled.block} × {pooled.block}, margins exact · {remark}"
    figure = _frame(received is not None, row_margin and entropy is not None)
    heat = cells(pooled, first, ATTENTION, (0.0, high), "weight")
    figure.add_trace(heat.update(colorbar={"len": 0.86, "y": 0, "yanchor": "bottom"}), row=2, col=1)
    if received is not None:
        figure.add_trace(_bars(received, pooled.block, "received", "v"), row=1, col=1)
    if row_margin and entropy is not None:
        figure.add_trace(_bars(entropy, pooled.block, "entropy", "h"), row=2, col=2)
        even = float(np.log(max(2, pooled.shape[1])))  # the entropy of an even spread, so that heads compare
        figure.update_xaxes(range=[0, max(even, float(np.nanmax(entropy, initial=0.0)))], row=2, col=2)
    token_axes(figure, pooled, (query_tokens, key_tokens), first, row=2, col=1)
    remark = f"{told} · {remark}" if told else remark
    return finish(figure, title, remark, height=int(np.clip(190 + 19 * pooled.cells.shape[0], 430, 820)))


def _frame(above: bool, beside: bool) -> go.Figure:
    figure = make_subplots(
        rows=2,
        cols=2,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.015 if beside else 0.0,
        vertical_spacing=0.02,
        row_heights=[0.14, 0.86] if above else [0.001, 0.999],
        column_widths=[0.87, 0.13] if beside else [0.999, 0.001],
    )
    small = {"size": 11}
    figure.update_yaxes(title={"text": "received", "font": small}, nticks=3, rangemode="tozero", row=1, col=1)
    if beside:
        figure.update_xaxes(
            title={"text": "entropy (nats)", "font": small}, nticks=3, rangemode="tozero", row=2, col=2
        )
    else:
        figure.update_xaxes(visible=False, row=2, col=2)
    return figure


def _bars(values: np.ndarray, block: int, name: str, orientation: str) -> go.Bar:
    """Exact values as bars that stand where their tokens are on the axis of the (perhaps pooled) map."""
    places = (np.arange(len(values)) + 0.5) / block - 0.5
    values = np.asarray(values, dtype=np.float32)
    upright = orientation == "v"
    return go.Bar(
        x=places if upright else values,
        y=values if upright else places,
        orientation=orientation,
        marker={"color": BEFORE, "line": {"width": 0}},
        showlegend=False,
        name=name,
        hovertemplate=f"{name} %{{{'y' if upright else 'x'}:.4f}}<extra></extra>",
    )


def _scale(pooled: Pooled, exclude_first: bool) -> tuple[float, str]:
    if not exclude_first:
        return 1.0, "colour scale 0 to 1"
    rest = np.where(pooled.key == 0, np.nan, pooled.cells)
    known = rest[np.isfinite(rest)]
    high = float(known.max()) if known.size and known.max() > 0 else 1.0
    return high, f"colour scale 0 to {high:.3g}, set without position 0 (its weights are unchanged)"


def _received(weights: np.ndarray, first: tuple[int, int]) -> np.ndarray:
    """Mean weight per key over the queries at or after it, or over all queries where some look ahead."""
    queries = np.arange(weights.shape[0])[:, None] + first[0]
    keys = np.arange(weights.shape[1])[None, :] + first[1]
    weights = np.nan_to_num(weights)
    sees = keys <= queries
    if (weights * ~sees).any():
        sees = np.ones_like(sees)
    return weights.sum(0) / np.maximum(sees.sum(0), 1)


def _entropy(weights: np.ndarray) -> np.ndarray:
    return -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(1)
