"""Attention that each key receives from some queries, exactly: from a set of rows, or from queries a little later.

`visible` counts the queries that the sum is over, so that `received / visible` is a mean weight. With `later` given
only the band of pairs that it names is computed, O(S·band); a set of rows costs those rows; everything at once costs
what the statistic "received" does: one pass. Memory is linear. Weights are as they are (after edits, sinks included);
queries that are padding or see no key take no part. On the CPU a whole-map sum is one call of the fused kernel where
it takes the map, on the backend `triton` it is the key-major kernel, elsewhere blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from headwater.kernels.backends.choose import choose_for
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.threads import mapped
from headwater.kernels.tiles import row_blocks
from headwater.kernels.tiles.block import Block


def received(
    map: MapState,
    queries: slice | Tensor | None = None,
    later: tuple[int, int] | None = None,
    heads: list[int] | None = None,
) -> Tensor:
    """Sum of the weights on each key, float32 [batch, head, key] on the CPU.

    `queries` is a slice without a step or bool [query] or [batch, query] (None: all). `later=(near, far)` keeps the
    queries that stand near to far positions after the key, both ends included. `heads` picks and orders heads.
    """
    chosen = _chosen(map, queries)
    _ordered(later)
    found = choose_for(map, transposed=True).received(map, chosen, later)
    if found is None:
        return _by_blocks(map, chosen, later, heads)
    return (found if heads is None else found[:, heads]).float().cpu()


def visible(
    map: MapState, queries: slice | Tensor | None = None, later: tuple[int, int] | None = None
) -> Tensor:
    """How many of these queries see each key, int64 [batch, head, key]; arguments as in `received`. No pass."""
    chosen = _chosen(map, queries)
    _ordered(later)
    batch, heads, _, keys = map.shape
    mask = map.mask
    if chosen is not None and mask.valid_queries is not None:
        chosen = chosen & mask.valid_queries.cpu()
    if chosen is not None:
        mask = replace(mask, valid_queries=chosen)
    if later is not None:
        # the pairs near to far apart are a band, and so is what a band leaves of a band
        near, far = later
        left = far if mask.left is None else min(mask.left, far)
        right = -near if mask.right is None else min(mask.right, -near)
        mask = replace(mask, left=left, right=right)
    return mask.seen_by(batch, heads).expand(batch, heads, keys).clone()


def _by_blocks(
    map: MapState, chosen: Tensor | None, later: tuple[int, int] | None, heads: list[int] | None
) -> Tensor:
    every = list(range(map.shape[1])) if heads is None else heads
    found = torch.zeros(map.shape[0], len(every), map.shape[3])

    def of_band(band: tuple[Block, slice]) -> tuple[Block, slice, Tensor]:
        block, places = band
        weights = map.block(block)
        if later is not None:
            rows, columns = block.positions(weights.device)
            ahead = rows + map.mask.shift - columns
            weights = weights * ((ahead >= later[0]) & (ahead <= later[1]))
        if chosen is not None:
            weights = weights * block.of_queries(chosen).to(weights.device)
        return block, places, weights.sum(-2)

    for block, places, sums in mapped(of_band, _bands(map, every, chosen, later), map.q.device):
        found[block.batch, places, block.columns] += sums.to(found)
    return found


def _bands(
    map: MapState, heads: list[int], chosen: Tensor | None, later: tuple[int, int] | None
) -> Iterator[tuple[Block, slice]]:
    """Blocks that hold all pairs that count, and the places of their heads in `heads`."""
    mask, batch = map.mask, map.shape[0]
    first, last = (0, mask.queries) if chosen is None else _span(chosen)
    widest = mask.queries + mask.keys + abs(mask.shift)
    near, far = later or (-widest, widest)
    band = min(far - near + 1, max(mask.keys, 1))
    # as tall as the band is wide, so that little of a tile lies outside of it, and still a cached size
    tall = min(max(band, 64), max(row_blocks.BLOCK_ELEMENTS // band, 16))
    per_tile = max(row_blocks.BLOCK_ELEMENTS // (tall * min(band + tall, max(mask.keys, 1))), 1)
    numbers = torch.tensor(heads, dtype=torch.long)
    for begin in range(first, last, tall):
        rows = slice(begin, min(begin + tall, last))
        if chosen is not None and not chosen[:, rows].any():
            continue
        low, high = mask.key_span(rows.start, rows.stop)
        low = max(low, rows.start + mask.shift - far)
        high = min(high, rows.stop + mask.shift - near)
        if low >= high:
            continue
        for b in range(0, batch, together := max(per_tile // max(len(heads), 1), 1)):
            for h in range(0, len(heads), per_tile):
                places = slice(h, h + per_tile)
                span = slice(b, min(b + together, batch))
                yield Block(span, numbers[places], rows, slice(low, high)), places


def _chosen(map: MapState, queries: slice | Tensor | None) -> Tensor | None:
    """The rows as bool [batch|1, query] on the CPU; None for all."""
    batch, _, length, _ = map.shape
    if queries is None:
        return None
    if isinstance(queries, slice):
        begin, end, step = queries.indices(length)
        if step != 1:
            raise ValueError(f"queries must be a slice without a step, or a mask; got {queries}")
        rows = torch.arange(length)
        return ((rows >= begin) & (rows < end))[None]
    given = queries[None] if queries.dim() == 1 else queries
    if (
        given.dtype != torch.bool
        or given.dim() != 2
        or given.shape[1] != length
        or len(given) not in (1, batch)
    ):
        raise ValueError(
            f"queries must be a slice, or bool [query] or [batch, query] with batch={batch}, query={length}; got "
            f"{str(queries.dtype).removeprefix('torch.')} {tuple(queries.shape)}"
        )
    return given.cpu()


def _span(chosen: Tensor) -> tuple[int, int]:
    rows = chosen.any(0).nonzero()[:, 0]
    return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)


def _ordered(later: tuple[int, int] | None) -> None:
    if later is not None and later[0] > later[1]:
        raise ValueError(f"later=(near, far) needs near <= far (positions after the key); got {later}")
