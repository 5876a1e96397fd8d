"""Exact summaries of maps that are smaller than a map: the strongest keys of each row, and block-pooled maps.

Both walk over blocks of rows once, on every backend; memory is the result plus one block. On a GPU the blocks are
larger and are reduced there. Pooling by the largest weight keeps a previous-token head and a sink visible but
overstates mass. Pooling by the mean keeps mass but hides a stripe one token wide.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headwater.kernels.rules.map_state import MapState
from headwater.kernels.threads import mapped
from headwater.kernels.tiles.block import Block

ON_A_GPU = 2**25  # weights in a block there: 128 MB in float32


def topk(map: MapState, k: int) -> tuple[Tensor, Tensor]:
    """Largest weights first, float32, and their columns, int64; both [batch, head, query, k].

    Rows with fewer than k positive weights end in weight 0 and column -1. Of equal weights any may be named.
    """
    batch, heads, queries, keys = map.shape
    if not 1 <= k <= keys:
        raise ValueError(f"k must be between 1 and the {keys} keys; got {k}")
    weights = torch.zeros(batch, heads, queries, k)
    columns = torch.full((batch, heads, queries, k), -1)

    def of_block(block: Block) -> tuple[Block, Tensor, Tensor]:
        found, place = map.block(block).topk(min(k, block.columns.stop - block.columns.start), -1)
        return block, found, torch.where(found > 0, place + block.columns.start, -1)

    for block, found, place in mapped(of_block, _blocks(map), map.q.device):
        width = found.shape[-1]
        # weights may be negative under some normalisers
        weights[block.batch, block.heads, block.rows, :width] = found.clamp(min=0).float().cpu()
        columns[block.batch, block.heads, block.rows, :width] = place.cpu()
    return weights, columns


def pooled(map: MapState, block: int, how: str = "max") -> Tensor:
    """Cells of `block` × `block` weights, [batch, head, ceil(query/block), ceil(key/block)] in float32.

    "max" is the largest weight of a cell, "mean" the mean over the query–key pairs of the cell that the map has,
    hidden ones counting as 0; cells at the far edges may hold fewer pairs.
    """
    if block < 1:
        raise ValueError(f"a cell must be at least 1 × 1; got block={block}")
    if how not in ("max", "mean"):
        raise ValueError(f"how must be 'max' or 'mean'; got {how!r}")
    batch, heads, queries, keys = map.shape
    down, across = -(-queries // block), -(-keys // block)
    device = map.q.device
    cells = torch.zeros(batch, heads, down, across, device=device)

    def of_block(part: Block) -> tuple[Block, slice, Tensor] | None:
        weights = map.block(part).float()
        first, last = part.columns.start // block, -(-part.columns.stop // block)
        if first >= last:
            return None
        # columns of whole cells, so that a row folds into [cell, block]
        before, after = part.columns.start - first * block, last * block - part.columns.stop
        folded = torch.nn.functional.pad(weights, (before, after)).unflatten(-1, (last - first, block))
        return part, slice(first, last), folded.amax(-1) if how == "max" else folded.sum(-1)

    for found in mapped(of_block, _blocks(map), map.q.device):
        if found is None:
            continue
        part, columns, values = found
        rows = (torch.arange(part.rows.start, part.rows.stop, device=device) // block)[None, None, :, None]
        target = cells[part.batch][:, part.heads, :, columns]
        rows = rows.expand_as(values)
        target = target.scatter_reduce(2, rows, values, "amax" if how == "max" else "sum")
        cells[part.batch, part.heads, :, columns] = target
    cells = cells.cpu()
    if how == "max":
        return cells
    tall = torch.full((down,), block).index_fill(0, torch.tensor([down - 1]), queries - (down - 1) * block)
    wide = torch.full((across,), block).index_fill(0, torch.tensor([across - 1]), keys - (across - 1) * block)
    return cells / (tall[:, None] * wide)


def _blocks(map: MapState) -> Iterator[Block]:
    """All rows; a GPU is kept busy by blocks that a core's cache could not hold."""
    elements = None if map.q.device.type == "cpu" else ON_A_GPU
    return map.row_blocks_of(elements)
