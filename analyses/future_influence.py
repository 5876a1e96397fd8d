"""Future attention influence: how much tokens far ahead look back at each token, and how local each step
looks.

Li et al. 2025, "Attention illuminates LLM reasoning": heads are split into local and global ones by their
mean attention distance; FAI is what a token receives from global heads some way ahead, WAAD how far local
heads look back, clipped. Only a band of each map is read, so time and memory are linear in the length.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._about import About
from headwater.analyses._settings import Bounds
from headwater.analyses.attention_distance import attention_distance
from headwater.lens.errors import AnalysisError
from headwater.lens.record import Record

ABOUT = About(
    question="Which tokens do later tokens come back to, and where does local attention reach further back?",
    unit="future_influence: mean weight per later token; windowed_distance: tokens",
    paper='Li et al. 2025, "Attention illuminates LLM reasoning" (FAI and WAAD)',
    inputs="record",
    cost="attention distance, then a band of `ahead_to` keys per query of the chosen heads; memory O(S)",
    not_for="models that are not causal; short texts; saying that such a token causes what follows",
)

ROWS = 64  # queries read at a time: a tile of 64 × (64 + band) weights per head


def future_influence(
    record: Record,
    share: Annotated[float, "fraction of heads that count as local, and as global", Bounds(0.0, 0.5)] = 0.3,
    ahead_from: Annotated[int, "nearest later token that counts (tokens ahead)", Bounds(1)] = 10,
    ahead_to: Annotated[int, "farthest later token that counts", Bounds(1)] = 50,
    window: Annotated[int, "distance at which looking back is clipped", Bounds(1)] = 10,
) -> xr.Dataset:
    """`future_influence[s] = mean of A_glob[t, s]` over t from s + `ahead_from` to s + `ahead_to` (or the
    last token), `windowed_distance[t] = Σ_s A_loc[t, s]·min(t - s, window)`.

    `A_loc` and `A_glob` are the mean maps of the `share` of all (layer, head) with the smallest and the
    largest mean attention distance over the whole batch (at least one head each); `local` and `global`
    [layer, head] say which. Dataset: `future_influence` [batch, key], NaN on padding and on the last
    `ahead_from` tokens, which no token that counts follows; `windowed_distance` [batch, query]. Weights count
    as they are. Unit: weight; tokens. Source: the paper's text, checked; the window constants from a
    re-implementation.
    """
    if not record.causal:
        name = record.provenance.get("model")
        raise AnalysisError(
            f"{name} is not causal; future influence is for models whose tokens see their past"
        )
    if not 0 < share <= 0.5:
        raise AnalysisError(f"share={share} is outside its limits; give a fraction above 0 and up to 0.5")
    if not 1 <= ahead_from <= ahead_to or window < 1:
        raise AnalysisError(
            f"ahead_from={ahead_from}, ahead_to={ahead_to}, window={window} make no band; "
            "give 1 ≤ ahead_from ≤ ahead_to and window ≥ 1"
        )
    distance = attention_distance(record)
    chosen = {"local": _extreme(distance, share, 1), "global": _extreme(distance, share, -1)}
    valid = record.valid
    received = torch.zeros(valid.shape, dtype=torch.float64)
    looked = torch.zeros(valid.shape, dtype=torch.float64)
    for depth, layer in enumerate(record.layers):
        near, far = (np.flatnonzero(chosen[name][depth]).tolist() for name in ("local", "global"))
        if far:
            received += _from_ahead(record, layer, far, ahead_from, ahead_to)
        if near:
            looked += _clipped(record, layer, near, window)
    places = valid.cumsum(1)
    later = (valid.sum(1, keepdim=True) - places).clamp(max=ahead_to) - ahead_from + 1
    influence = received / int(chosen["global"].sum()) / torch.where(valid & (later > 0), later, torch.nan)
    windowed = (looked / int(chosen["local"].sum())).masked_fill(~valid, torch.nan)
    tokens = np.array(record.strings, dtype=str)
    result = xr.Dataset(
        {
            "future_influence": (("batch", "key"), influence.numpy()),
            "windowed_distance": (("batch", "query"), windowed.numpy()),
            "local": (("layer", "head"), chosen["local"]),
            "global": (("layer", "head"), chosen["global"]),
        },
        coords={
            "layer": record.layers,
            "head": np.arange(record.n_heads),
            "key_token": (("batch", "key"), tokens),
            "query_token": (("batch", "query"), tokens),
        },
    )
    settings = {"share": share, "ahead_from": ahead_from, "ahead_to": ahead_to, "window": window}
    return result.assign_attrs(ABOUT.attrs(record.provenance, **settings))


def _extreme(distance: xr.DataArray, share: float, sign: int) -> np.ndarray:
    """The heads with the smallest (sign 1) or largest (-1) distance, bool [layer, head]; heads without one
    are in none."""
    values = sign * distance.values
    count = max(1, round(share * np.isfinite(values).sum()))
    picked = np.zeros(values.size, dtype=bool)
    picked[np.argsort(values, axis=None, kind="stable")[:count]] = True  # NaN sorts last
    return picked.reshape(values.shape)


def _band(record: Record, layer: int, heads: list[int], back: int):
    """Blocks of rows with the keys up to `back` before them: (rows, columns, weights summed over heads, t -
    s)."""
    map, length = record.map(layer), record.valid.shape[1]
    for begin in range(0, length, ROWS):
        rows = slice(begin, min(begin + ROWS, length))
        columns = slice(max(begin - back, 0), rows.stop)
        weights = map.tile(rows, columns, heads).sum(1).double().cpu()
        ahead = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(columns.start, columns.stop)
        yield rows, columns, weights, ahead


def _from_ahead(record: Record, layer: int, heads: list[int], nearest: int, farthest: int) -> Tensor:
    """What each key gets from the queries `nearest` to `farthest` tokens ahead, summed over heads, [batch,
    key]."""
    total = torch.zeros(record.valid.shape, dtype=torch.float64)
    for _, columns, weights, ahead in _band(record, layer, heads, farthest):
        inside = (ahead >= nearest) & (ahead <= farthest)
        total[:, columns] += (weights * inside).sum(1)
    return total


def _clipped(record: Record, layer: int, heads: list[int], window: int) -> Tensor:
    """Σ_s A[t, s]·min(t - s, window), summed over heads, [batch, query]: the window times the row's mass,
    less what is nearer."""
    mass = torch.from_numpy(record.statistic("row_mass").sel(layer=layer, head=heads).values)
    total = window * mass.nan_to_num().double().sum(1)
    for rows, _, weights, ahead in _band(record, layer, heads, window):
        nearer = (window - ahead).clamp(min=0)  # what lies ahead has no weight
        total[:, rows] -= (weights * nearer).sum(2)
    return total.clamp(min=0)  # rounding
