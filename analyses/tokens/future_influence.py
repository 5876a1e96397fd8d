"""Future attention influence: how much tokens far ahead look back at each token, and how locally each token looks.

Li et al. 2025, "Attention illuminates LLM reasoning", split heads into local and global ones by their mean attention
distance. FAI is what a token receives from global heads some way ahead; WAAD is how far local heads look back, clipped.
Only a band of each map is read, so time and memory are linear in the length.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses.tokens.attention_distance import attention_distance
from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record


@analysis(maps="square")
def future_influence(
    record: Record,
    share: Annotated[
        float, "fraction of heads that count as local, and as global", Bounds(0.0, 0.5, above=True)
    ] = 0.3,
    ahead_from: Annotated[int, "nearest later token that counts (tokens ahead)", Bounds(1)] = 10,
    ahead_to: Annotated[int, "farthest later token that counts", Bounds(1)] = 50,
    window: Annotated[int, "distance at which looking back is clipped", Bounds(1)] = 10,
    marked: Annotated[float, "fraction of a text's tokens in each of the two sets", Bounds(0.0, 1.0)] = 0.4,
) -> xr.Dataset:
    """`future_influence[s] = mean of A_glob[t, s]` over t from s + `ahead_from` to s + `ahead_to` (or the last token),
    and `windowed_distance[t] = Σ_s A_loc[t, s]·min(t - s, window)`. The paper calls them FAI and WAAD.

    `A_loc` and `A_glob` are the mean maps of the `share` of all (layer, head) with the smallest and the largest mean
    attention distance over the whole batch (at least one head each); `local` and `global` [layer, head] mark these
    heads. `future_influence` [batch, key] is NaN on padding and on the last `ahead_from` tokens, which no later token
    counts for; `windowed_distance` is [batch, query]. Weights are not divided by the row mass.

    `boundary` [batch, query] is the paper's `T_loc`: the `marked` share of a text's tokens with the largest
    `step[t] = |windowed_distance[t] - windowed_distance[t + 1]|` (in the result too; NaN for the last token). `anchor`
    [batch, key] is `T_glob`: the same share by future influence. A token without a value is in neither set, and shares
    count tokens with a value; among equals the earlier come first.

    Question: Which tokens do later tokens come back to, and where does local attention reach further back?
    Unit: future_influence: mean weight per later token; windowed_distance: tokens.
    Source: Li et al. 2025, "Attention illuminates LLM reasoning" (FAI and WAAD); checked against the paper's text, the
    window constants from a re-implementation.
    Cost: attention distance, then a band of `ahead_to` keys per query of the chosen heads; memory O(S).
    Not for: models that are not causal; short texts; saying that such a token causes what follows.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> record = model.record("When Mary and John went to the store , John gave a drink to")
    >>> found = hw.analyses.future_influence(record, ahead_from=2, ahead_to=6)
    >>> int(found["global"].sum()), found.future_influence.isnull().values[0, -3:].tolist()  # heads, last tokens
    (10, [False, True, True])
    """
    if not record.causal:
        name = record.provenance.get("model")
        raise AnalysisError(
            f"{name} is not causal; future influence is for models whose tokens see their past"
        )
    if ahead_from > ahead_to:
        raise AnalysisError(
            f"ahead_from={ahead_from} is above ahead_to={ahead_to}; give 1 ≤ ahead_from ≤ ahead_to"
        )
    distance = attention_distance(record)
    chosen = {"local": _extreme(distance, share, 1), "global": _extreme(distance, share, -1)}
    valid = record.valid
    received, looked = torch.zeros(2, *valid.shape, dtype=torch.float64)
    for depth, layer in enumerate(record.layers):
        near, far = (np.flatnonzero(chosen[name][depth]).tolist() for name in ("local", "global"))
        if far:
            # only the band of pairs that lie so far apart is computed
            received += record.map(layer).received(later=(ahead_from, ahead_to), heads=far).double().sum(1)
        if near:
            looked += _clipped(record, layer, near, window)
    places = valid.cumsum(1)
    later = (valid.sum(1, keepdim=True) - places).clamp(max=ahead_to) - ahead_from + 1
    influence = received / int(chosen["global"].sum()) / torch.where(valid & (later > 0), later, torch.nan)
    windowed = (looked / int(chosen["local"].sum())).masked_fill(~valid, torch.nan)
    steps = torch.nn.functional.pad(windowed.diff(dim=1).abs(), (0, 1), value=torch.nan)
    tokens = np.array(record.strings, dtype=str)
    return xr.Dataset(
        {
            "future_influence": (("batch", "key"), influence.numpy()),
            "windowed_distance": (("batch", "query"), windowed.numpy()),
            "step": (("batch", "query"), steps.numpy()),
            "boundary": (("batch", "query"), _top(steps, marked)),
            "anchor": (("batch", "key"), _top(influence, marked)),
            "local": (("layer", "head"), chosen["local"]),
            "global": (("layer", "head"), chosen["global"]),
        },
        coords={
            "layer": record.layers, "head": np.arange(record.n_heads),
            "key_token": (("batch", "key"), tokens), "query_token": (("batch", "query"), tokens),
        },
    )  # fmt: skip


def _top(values: Tensor, share: float) -> np.ndarray:
    """The `share` of each row's finite values that are largest, bool [batch, position]; among equals the first."""
    ranks = values.nan_to_num(-torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    count = (share * values.isfinite().sum(1, keepdim=True)).round()
    return ((ranks < count) & values.isfinite()).numpy()


def _extreme(distance: xr.DataArray, share: float, sign: int) -> np.ndarray:
    """The heads with the smallest (sign 1) or largest (-1) distance, bool [layer, head]; never a head without one."""
    values = sign * distance.values
    count = max(1, round(share * np.isfinite(values).sum()))
    picked = np.zeros(values.size, dtype=bool)
    picked[np.argsort(values, axis=None, kind="stable")[:count]] = True  # NaN sorts last
    return picked.reshape(values.shape)


def _clipped(record: Record, layer: int, heads: list[int], window: int) -> Tensor:
    """Σ_s A[t, s]·min(t - s, window), summed over heads, [batch, query].

    It is the window times the row's mass, less `(window - back)` times the weight of each nearer key.
    """
    mass = torch.from_numpy(record.statistic("row_mass").sel(layer=layer, head=heads).values)
    total = window * mass.nan_to_num().double().sum(1)
    for back in range(window):
        total -= (window - back) * record.map(layer).stripe(back)[:, heads].double().cpu().sum(1)
    return total.clamp(min=0)  # rounding may leave a negative sum
