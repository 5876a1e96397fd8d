"""Attention distance: how many tokens away a head looks on average.

It is the mean over queries of `Σ_j A_ij·|i - j|`; Li et al. 2025 split heads into local and global ones by it. It costs
one row statistic of the recording pass. A mean hides the spread: a head that looks at the neighbour and at the first
token scores like one that looks half-way.
"""

from __future__ import annotations

from typing import Annotated

import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._prompts.positions import Positions, columns_of
from headwater.lens.records.record import Record


@analysis(maps="square")
def attention_distance(
    record: Record,
    queries: Annotated[Positions, 'queries to average over (the response, say), or "all"'] = "all",
    per_example: Annotated[bool, "keep one value per batch row instead of their mean"] = False,
) -> xr.DataArray:
    """`d(l, h) = mean_i Σ_j A_ij·|i - j| / Σ_j A_ij`, as [layer, head], or [batch, layer, head] with `per_example`.

    The mean runs over the real queries of a batch row (or the `queries` asked for), then over batch rows, so that long
    texts do not outweigh short ones. Rows without any weight (padding, every key blocked) are left out; a head without
    any other row is NaN. Rows are divided by their mass, so that learned sinks do not read as nearness.

    Question: How far from the query does each head look?
    Unit: tokens.
    Source: Li et al. 2025, "Attention illuminates LLM reasoning" (mean distance d(l, h) of WAAD/FAI); formula checked
    against the paper, the division by the row mass is ours.
    Cost: the row statistics distance and row_mass, free in the recording pass.
    Not for: pictures, whose patches have no order (`patch_distance` counts patches); telling local from mixed heads by
    itself; comparing texts of different length, as it grows with length.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> record = model.record("When Mary and John went to the store , John gave a drink to")
    >>> found = hw.analyses.attention_distance(record)
    >>> found.dims, float(found.sel(layer=1, head=7).round(1))
    (('layer', 'head'), 1.9)
    """
    columns = columns_of(queries, record.valid, "queries")
    asked = torch.zeros_like(record.valid).scatter(1, columns, True) & record.valid
    distance, mass = record.statistic("distance"), record.statistic("row_mass")
    kept = xr.DataArray(asked.numpy(), dims=("batch", "query"))
    per_row = (distance / mass.where(mass > 0)).where(kept).astype(float)
    result = per_row.mean("query") if per_example else per_row.mean("query").mean("batch")
    return result.drop_attrs().rename("attention_distance")
