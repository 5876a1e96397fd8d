"""Space and time: how much attention each head of a video model keeps inside a frame, and at one place over time.

Walks over the rows of each layer, and over those of uniform attention.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds, Draws
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses.sinks._uniform_map import even_map
from headwater.lens.errors import AnalysisError
from headwater.lens.naming.grids import Grid
from headwater.lens.recipes.video import near
from headwater.lens.records.record import Record

KINDS = ("spatial", "temporal", "elsewhere", "to_prefix")


@analysis(maps="square")
def space_time(
    record: Record,
    reach: Annotated[int, "rows and columns that count as the same place", Bounds(0)] = 1,
    draws: Draws = 1000,
    seed: Annotated[int, "seed of the intervals", Bounds(0)] = 0,
) -> xr.Dataset:
    """`share[k, l, h] = mean over patches i of Σ_{j of kind k} A_ij`, with four kinds of keys that add up to a row.

    `kind` is "spatial", the patches of the own frame; "temporal", in other frames the patches at most `reach` rows and
    columns away; "elsewhere", the other patches; "to_prefix", tokens that are no patches. `share`, `low`, `high`
    [kind, layer, head] are the mean over videos and its 95 % bootstrap bounds, `per_example` [batch, kind, layer, head]
    has each video, and `chance` [kind] is the share under uniform attention over the keys that a patch sees, the mean
    over videos, layers and heads: of a causal text that holds the video, patches see no later ones. AnalysisError for
    a record without videos of one size.

    Question: Does each head look inside its frame or along time?
    Unit: share of a head's attention, 0 to 1.
    Source: ours.
    Cost: two walks over the rows of each layer, memory O(S) per row block.
    Not for: what a head needs: a head that looks along time may carry nothing; see frame_knockout.

    >>> import torch
    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("videomae"))
    >>> found = hw.analyses.space_time(model.record(pixel_values=torch.randn(2, 4, 3, 16, 16)), draws=10)
    >>> found.share.dims, found.chance.values.tolist()  # 2 frames of 2 × 2 patches
    (('kind', 'layer', 'head'), [0.5, 0.5, 0.0, 0.0])
    """
    grid = _grid(record)
    frame, row, column = grid.coordinates().T
    own = frame[:, None] == frame
    along = ~own & near(row, reach) & near(column, reach)
    count = record.valid.shape[1]
    kinds = torch.zeros(count, len(frame), len(KINDS), dtype=torch.float64)  # [key, patch, kind]
    kinds[:, :, 3] = 1.0
    kinds[grid.tokens()] = torch.stack([own, along, ~own & ~along, torch.zeros_like(own)], -1).double()
    number = torch.full((count,), -1)
    number[grid.tokens()] = torch.arange(len(frame))
    found = torch.zeros(
        len(record.valid), len(KINDS), len(record.layers), record.n_heads, dtype=torch.float64
    )
    even = torch.zeros_like(found)
    for place, layer in enumerate(record.layers):
        for total, map in ((found, record.map(layer)), (even, even_map(record.map(layer)))):
            for span, tile in map.row_blocks():
                looking = number[span] >= 0
                weights = tile[:, :, looking].double().cpu()
                of_row = kinds[:, number[span][looking]]
                total[:, :, place] += torch.einsum("bhqk,kqc->bch", weights, of_row) / len(frame)
    return xr.Dataset(
        {
            **intervals(found.numpy(), ("kind", "layer", "head"), draws, seed, ("share", "low", "high")),
            "chance": ("kind", even.mean((0, 2, 3)).numpy()),
            "per_example": (("batch", "kind", "layer", "head"), found.numpy()),
        },
        coords={
            "kind": list(KINDS), "layer": record.layers, "head": np.arange(record.n_heads),
            "batch": np.arange(len(found)),
        },
        attrs={"grid": list(grid.shape)},
    )  # fmt: skip


def _grid(record: Record) -> Grid:
    """The grid of the videos; all stand at one place and have one shape."""
    grids = {row[0] for row in record.grids if len(row) == 1 and row[0].frames > 1}
    if len(grids) != 1 or any(len(row) != 1 for row in record.grids):
        raise AnalysisError(
            "the record has no grid of several frames; give one of videos of one size (VideoMAE, ViViT, V-JEPA 2)"
        )
    return grids.pop()
