"""Attention rollout: how much of each input token reaches a chosen position if attention alone moved
information.

Abnar & Zuidema 2020 (arXiv 2005.00928). The rows asked for are pulled down through the transposed maps, layer
by layer, so memory is linear in the length; only head="max"/"min" walk over blocks of rows. Values, output
projections and MLPs are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._about import About
from headwater.analyses._joined import (
    EXTREMES,
    Reduction,
    consecutive_layers,
    head_mixing,
    over_row_sums,
    residual_weight,
)
from headwater.analyses._positions import Positions, columns_of, position_coordinates
from headwater.analyses._settings import Bounds
from headwater.kernels.operator import AttentionMap
from headwater.lens.record import Record

ABOUT = About(
    question="From which input tokens does a position draw, if attention alone carried information?",
    unit="share of the position, each row sums to 1",
    paper="Abnar & Zuidema 2020, arXiv:2005.00928",
    inputs="record",
    cost="one transposed attention pass per layer and 64 queries, memory O(S·queries); max, min: all rows once",
    not_for="what the model uses: it knows neither values nor MLPs, and favours early tokens in causal models",
)

CHUNK = 64  # queries that travel together: as many columns as one head is wide, so a pass costs one attention call


def rollout(
    record: Record,
    queries: Annotated[Positions, 'positions to explain, e.g. -1; "all" for every one'] = (-1,),
    residual: Annotated[float, "weight of the residual stream against attention", Bounds(0.0, 1.0)] = 0.5,
    heads: Annotated[
        Reduction | Sequence[Sequence[float]], "how the heads of a layer become one map"
    ] = "mean",
    add_residual: Annotated[bool, "mix in the residual stream at all"] = True,
    last_layer: Annotated[
        int | None, "last layer of the product; none: the last one recorded", Bounds(0)
    ] = None,
) -> xr.DataArray:
    """Rows `R[i, :]` of `R = Ã_L ··· Ã_1` with `Ã_l = rownorm((1 - w)·Ā_l + w·I)`, as [batch, query, key].

    `Ā_l` is the mean over heads (or the largest or smallest weight of each entry, or the mean with given
    weights [layer, head], which are divided by their sum). `w` is `residual`; `add_residual=False` takes
    `rownorm(Ā_l)`. With rows that sum to 1 and w = 0.5 this is the paper's `0.5·Ā + 0.5·I`. A row without
    weight (every key blocked) stays where it is if there is a residual; otherwise what passes through it is
    undefined and its result is NaN. Unit: share, rows sum to 1. Source: the authors' code and paper, checked.

    A record that does not begin at layer 0 gives shares of the residual stream that enters its first layer.
    """
    layers = consecutive_layers(record, last_layer)
    weight = residual_weight(residual, add_residual)
    columns = columns_of(queries, record.valid, "queries")
    mixing = head_mixing(heads, layers, record.n_heads)
    rows = torch.zeros(*columns.shape, record.valid.shape[1])
    rows.scatter_(2, columns[..., None], 1.0)
    rows = rows.mT.contiguous()  # [batch, position, asked]
    for depth, layer in reversed(list(enumerate(layers))):
        if isinstance(mixing, str):
            rows = _pull_extreme(record.map(layer), rows, weight, EXTREMES[mixing])
        else:
            mass = torch.from_numpy(record.statistic("row_mass").sel(layer=layer).values)
            rows = _pull(record.map(layer), mass, rows, weight, mixing[depth])
    undefined = rows.isnan().any(1) | ~record.valid.gather(1, columns)
    shares = rows.mT.masked_fill(undefined[..., None], torch.nan)
    settings = {"residual": residual, "heads": heads, "add_residual": add_residual, "layers": layers}
    return xr.DataArray(
        shares.numpy(),
        dims=("batch", "query", "key"),
        coords=position_coordinates(record, queries, columns),
        name="rollout",
        attrs=ABOUT.attrs(record.provenance, **settings),
    )


def _pull(map: AttentionMap, mass: Tensor, rows: Tensor, weight: float, mixing: Tensor) -> Tensor:
    """One layer down: `Ãᵀ @ rows` for rows [batch, position, asked]; `mass` [batch, head, query], `mixing`
    [head]."""
    rows = over_row_sums(rows, torch.einsum("h,bhq->bq", mixing, mass.nan_to_num()), weight)
    moved = [
        torch.einsum("h,bhkt->bkt", mixing, (map.T @ chunk.contiguous()).float().cpu())
        for chunk in rows.split(CHUNK, dim=2)
    ]
    return weight * rows + (1 - weight) * torch.cat(moved, dim=2)


def _pull_extreme(map: AttentionMap, rows: Tensor, weight: float, extreme: Callable[..., Tensor]) -> Tensor:
    """The same with the largest or smallest weight over heads, from blocks of rows, since neither is
    linear."""
    out = torch.zeros_like(rows)
    for span, weights in map.row_blocks():
        merged = extreme(weights.float(), dim=1).cpu()  # [batch, query, key]
        block = over_row_sums(rows[:, span], merged.sum(-1), weight)
        out += (1 - weight) * torch.einsum("bqk,bqt->bkt", merged, block)
        out[:, span] += weight * block
    return out
