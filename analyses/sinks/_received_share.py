"""The share of attention that each token receives: the mean weight on it, over the queries that see it.

`α_j = Σ_i A_ij / #{i that see j}`, from the column statistics of a record; for chosen queries or renormalised rows from
one transposed attention pass per layer. In a causal map more queries see an early token, so the plain sum of a column
would make early tokens sinks by construction.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.records.record import Record

FEW = 256  # up to so many rows are read as one dense tile


def received_share(record: Record, unit_rows: bool = False, queries: Tensor | None = None) -> xr.DataArray:
    """α as [batch, layer, head, key] in float64; NaN for padding and for keys that no query sees.

    `unit_rows` divides each row by its sum first, for maps whose rows do not sum to 1. `queries` (bool [batch, query])
    limits numerator and denominator to these queries.
    """
    return share_and_visible(record, unit_rows, queries)[0]


def share_and_visible(
    record: Record, unit_rows: bool = False, queries: Tensor | None = None
) -> tuple[xr.DataArray, xr.DataArray]:
    """`received_share`, and how many of these queries see each key, [batch, layer, head, key]."""
    received, visible = record.statistic("received"), record.statistic("visible")
    if unit_rows or queries is not None:
        kept = record.valid if queries is None else queries & record.valid
        pairs = [_of_queries(record.map(layer), kept, unit_rows) for layer in record.layers]
        received, visible = (
            template.copy(data=np.stack([pair[which].numpy() for pair in pairs], axis=1))
            for which, template in enumerate((received, visible))
        )
    real = xr.DataArray(record.key_axis.valid.numpy(), dims=("batch", "key"))
    share = (received / visible.where(visible > 0)).where(real).astype(np.float64)
    return share.drop_attrs().rename("received_share"), visible


def _of_queries(map: AttentionMap, kept: Tensor, unit_rows: bool) -> tuple[Tensor, Tensor]:
    """The weight that the kept queries put on each key, and how many of them see it; both [batch, head, key]."""
    batch, heads, _, keys = map.shape
    visible = replace(map.rule.mask, valid_queries=kept).seen_by(batch, heads).expand(batch, heads, keys)
    place = kept.any(0).nonzero()[:, 0]
    rows = slice(int(place[0]), int(place[-1]) + 1)
    if unit_rows or rows.stop - rows.start > FEW:
        weights = kept[:, None].expand(-1, heads, -1).float()
        if unit_rows:
            mass = map.statistic("row_mass").nan_to_num().cpu()
            weights = torch.where(mass > 0, weights / mass, 0.0)
        return (map.T @ weights[..., None].contiguous())[..., 0].float().cpu(), visible
    received = torch.zeros(batch, heads, keys)
    # few rows: read their tile instead of a pass over all rows
    last = map.rule.mask.key_span(rows.start, rows.stop)[1]
    tile = map.tile(rows, slice(0, last)).cpu()
    received[..., :last] = torch.einsum("bhqk,bq->bhk", tile, kept[:, rows].float())
    return received, visible
