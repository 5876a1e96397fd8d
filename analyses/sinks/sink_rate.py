"""Sink rate: how often the received share of one token exceeds a threshold.

The metric `Sink_k` of Gu et al., ICLR 2025 (arXiv 2410.10781), from the column statistics of a record. The values do
not count: a high rate shows where attention goes, not its effect.
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
    threshold: Annotated[float, "share above which the token is a sink", Bounds(0.0, 1.0)] = 0.3,
    key: Annotated[int, "the token, counted in real tokens of each row; 0 is the first"] = 0,
    unit_rows: Annotated[bool, "divide each row by its sum first (learned sinks, normalisers)"] = False,
) -> xr.Dataset:
    """`sink_rate`, the mean over (batch, layer, head) of `1[α > threshold]`; `α = Σ_i A[i, key] / #{i that see key}`.

    Dataset: `sink_rate`; `rate` [layer, head], its mean over the batch alone; `received_share` [layer, head], the mean
    of α; `received_share_per_example` [batch, layer, head], which is α. In a causal map of n tokens n - key queries see
    the key; a window lets fewer see it. `unit_rows` replaces A by `A / Σ_j A`, the paper's proxy for rows that do not
    sum to 1. If no query sees the token, α is NaN and does not count; the attribute `undefined` counts such cases.
    AnalysisError if all are NaN. The paper's rates are percentages for texts of 64 tokens and threshold 0.3.

    Question: How often is one token an attention sink?
    Unit: fraction of (batch row, layer, head); shares are mean weights per query that sees the key.
    Source: Gu et al., ICLR 2025, arXiv:2410.10781; held to the authors' code.
    Cost: the statistics received and visible: one transposed attention pass per layer unless recorded, memory O(S).
    Not for: saying that a head does nothing: the value at the sink may be large; comparing texts of unequal length.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("When Mary and John went to the store , John gave a drink to")
    >>> found = hw.analyses.sink_rate(record)
    >>> [round(x, 1) for x in found.rate.mean("head").values.tolist()]  # layer by layer
    [0.0, 0.6, 0.1, 0.5]
    """
    column = xr.DataArray(columns_of(key, record.key_axis.valid, "key")[:, 0].numpy(), dims="batch")
    share = received_share(record, unit_rows).isel(key=column)
    share = share.reset_coords(drop=True).assign_coords({name: share[name] for name in ("layer", "head")})
    if bool(share.isnull().all()):
        raise AnalysisError(
            f"no query sees token {key} in any batch row; choose another key or record more tokens"
        )
    above = (share > threshold).where(share.notnull())
    return xr.Dataset(
        {
            "sink_rate": above.mean(),
            "rate": above.mean("batch"),
            "received_share": share.mean("batch"),
            "received_share_per_example": share,
        },
        attrs={"undefined": int(share.isnull().sum())},
    )
