"""The figure of any result, chosen by its dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import xarray as xr

from headwater.dashboard.figures.heads import head_grid
from headwater.dashboard.figures.labelled import labelled_bars, labelled_map
from headwater.dashboard.figures.pattern import pattern_map
from headwater.dashboard.figures.tokens import token_bars


def figure(result: xr.DataArray, tokens: Sequence[str] = (), title: str | None = None) -> go.Figure:
    """Draw ``result``: [layer, head] as a grid, [query, key] as a map, [query] or [key] as bars, others by coordinate.

    Dimensions of length one are dropped. ``tokens`` label queries and keys; without them positions do.
    """
    result = result.squeeze(drop=True)
    title = title or str(result.attrs.get("question", result.name or "result"))
    unit = str(result.attrs.get("unit", ""))
    dimensions = set(map(str, result.dims))
    if dimensions == {"layer", "head"}:
        return head_grid(result, title, unit)
    if dimensions == {"query", "key"}:
        weights = result.transpose("query", "key").values
        return pattern_map(weights, _names(tokens, weights.shape[0]), _names(tokens, weights.shape[1]), title)
    if len(dimensions) == 1 and dimensions <= {"query", "key"}:
        return token_bars(result.values, _names(tokens, result.size), title, unit)
    if result.dtype.kind in "fiub" and len(dimensions) in (1, 2):
        return (
            labelled_map(result, title, unit) if len(dimensions) == 2 else labelled_bars(result, title, unit)
        )
    raise ValueError(
        f"no figure for dimensions {list(result.dims)} of {result.dtype}; a figure draws numbers along one or two: "
        "select one value of the others"
    )


def _names(tokens: Sequence[str], count: int) -> Sequence[str]:
    return tokens if len(tokens) == count else [""] * count
