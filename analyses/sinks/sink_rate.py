"""Sink rate: how often a head hands one token more than a fixed share of the attention it could get.

Gu et al., ICLR 2025 (arXiv 2410.10781), its `Sink_k`. Costs the column statistics of a record; leaves out
what the sink's value carries, so a high rate says where attention goes and not that it does anything there.
"""

from __future__ import annotations

from typing import Annotated

import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.positions import columns_of
from headwater.analyses.sinks._received_share import received_share
from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record


@analysis
def sink_rate(
    record: Record,
    threshold: Annotated[float, "share above which the token counts as a sink", Bounds(0.0, 1.0)] = 0.3,
    key: Annotated[int, "the token, counted in real tokens of each row; 0 is the first"] = 0,
    unit_rows: Annotated[
        bool, "divide each row by its mass first (learned sinks, other normalisers)"
    ] = False,
) -> xr.Dataset:
    """`sink_rate` = mean over (batch, layer, head) of `1[α > threshold]`, with `α = Σ_i A[i, key] / #{i that
    see key}`.

    Also `received_share` [layer, head], the mean of α over the batch, `rate` [layer, head], the fraction of
    the batch above it, and `received_share_per_example` [batch, layer, head]. For a causal map of n tokens `#`
    is n - key, with a window what the window lets through. Weights count as they are; with `unit_rows` as `A
    / Σ_j A`, the paper's proxy for rows that do not sum to 1. Where no query sees the token α is NaN and left
    out; `undefined` counts them. Published rates are for the first 64 tokens of a text, threshold 0.3, in per cent.
    Unit: fraction; shares
    are weights. Source: the authors' code, checked.

    Question: How often is one token an attention sink?
    Unit: fraction of (batch row, layer, head); shares are mean weights per query that sees the key.
    Source: Gu et al., ICLR 2025, arXiv:2410.10781.
    Cost: the statistics received and visible: one transposed attention pass per layer unless recorded, memory O(S).
    Not for: saying that a head does nothing: the value at the sink may be large; comparing texts of unequal length.
    """
    column = xr.DataArray(columns_of(key, record.valid, "key")[:, 0].numpy(), dims="batch")
    share = received_share(record, unit_rows).isel(key=column)
    share = share.reset_coords(drop=True).assign_coords({name: share[name] for name in ("layer", "head")})
    if bool(share.isnull().all()):
        raise AnalysisError(
            f"no query sees token {key} in any batch row; choose another key or record more tokens"
        )
    above = (share > threshold).where(share.notnull())
    result = xr.Dataset(
        {
            "sink_rate": above.mean(),
            "rate": above.mean("batch"),
            "received_share": share.mean("batch"),
            "received_share_per_example": share,
        }
    )
    settings = {"undefined": int(share.isnull().sum())}
    return result.assign_attrs(settings)
