"""How an edit changed one attention map: after minus before, on a colour scale symmetric about zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from headwater.dashboard.figures.cells import cells, token_axes
from headwater.dashboard.figures.pooling import MOST_CELLS, pool
from headwater.dashboard.figures.style import DIVERGING, finish


def difference_map(
    before: np.ndarray,
    after: np.ndarray,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    title: str,
    *,
    most: int = MOST_CELLS,
) -> go.Figure:
    """Change of each weight, red where attention grew, blue where it fell.

    Above ``most`` a side, a cell is the change of largest absolute value of its block.
    """
    change = np.asarray(after, dtype=np.float32) - np.asarray(before, dtype=np.float32)
    pooled = pool(change, most, signed=True)
    known = np.abs(pooled.cells[np.isfinite(pooled.cells)])
    reach = float(known.max()) if known.size and known.max() > 0 else 1.0
    figure = go.Figure(cells(pooled, (0, 0), DIVERGING, (-reach, reach), "change"))
    token_axes(figure, pooled, (query_tokens, key_tokens), (0, 0))
    remark = f"colour scale ±{reach:.3g}, red grew, blue fell"
    if pooled.is_pooled:
        remark = f"each cell = largest change of {pooled.block} × {pooled.block} · {remark}"
    return finish(figure, title, remark, height=int(np.clip(150 + 19 * pooled.cells.shape[0], 380, 760)))
