"""Products with the patterns that an edit mixes into a map: `T @ x` and `T^T @ y`, not normalised, as in the tiles.

A row of most patterns has the same weight on every key of one range, in the order of the keys or in one that puts equal
tokens side by side: its product is a difference of two prefix sums, and the transpose a prefix sum of differences.
Both take linear time and memory, some heads at a time. The sums are float64, so that their differences keep float32's
digits. Given weights (`Fixed`) and another map (`OfMap`) are multiplied a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from headwater.kernels.edits.patterns import Fixed, Matching, Offset, OfMap, OnKeys, Pattern
from headwater.kernels.threads import mapped
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.heads import per_query_head
from headwater.kernels.tiles.mask import Mask
from headwater.kernels.tiles.row_blocks import blocks

SUMS = 2**22  # numbers in one piece of prefix sums: 32 MB


class Ranges(NamedTuple):
    """Row i weighs the keys `order[low[i]:high[i]]` by `weight`, each [batch|1, query] or [batch|1, key]."""

    low: Tensor
    high: Tensor
    weight: Tensor
    order: Tensor


def gather(pattern: Pattern, mask: Mask, heads: int, x: Tensor) -> Tensor:
    """`T @ x` for x [batch, kv head|head|1, key, c] → [batch, as many heads or `heads`, query, c]; a band's mask."""
    found = _ranges(pattern, mask, x.device)
    if found is None:
        x = per_query_head(x, heads)
        out = x.new_zeros(len(x), heads, mask.queries, x.shape[-1])

        def of_block(block: Block) -> tuple[Block, Tensor]:
            return block, pattern.tile(block, mask, x) @ x[block.batch][:, block.heads, block.columns]

        for block, part in mapped(of_block, blocks(len(x), range(heads), mask), x.device):
            out[block.batch, block.heads, block.rows] = part
        return out
    # With C[n] = sum of weight * x over the first n keys in the order of the pattern:  (T @ x)_i = C[high_i] - C[low_i]
    low, high, weight, order = (place[:, None, :, None] for place in found)
    out = x.new_empty(len(x), x.shape[1], mask.queries, x.shape[-1])
    for some in _few_heads(x):
        kept = torch.take_along_dim(x[:, some].double() * weight, order, 2)
        sums = torch.nn.functional.pad(kept.cumsum(2), (0, 0, 1, 0))
        out[:, some] = (torch.take_along_dim(sums, high, 2) - torch.take_along_dim(sums, low, 2)).to(x)
    return out


def scatter(pattern: Pattern, mask: Mask, y: Tensor) -> Tensor:
    """`T^T @ y` for y [batch, head, query, c] → [batch, head, key, c]; a band's mask."""
    (batch, heads, _, width), keys = y.shape, mask.keys
    found = _ranges(pattern, mask, y.device)
    if found is None:
        out = y.new_zeros(batch, heads, keys, width)

        def of_block(block: Block) -> tuple[Block, Tensor]:
            return block, pattern.tile(block, mask, y).mT @ y[block.batch][:, block.heads, block.rows]

        for block, part in mapped(of_block, blocks(batch, range(heads), mask), y.device):
            out[block.batch, block.heads, block.columns] += part
        return out
    low, high, weight, order = (place[:, None, :, None] for place in found)
    # The transpose of a difference of prefix sums: row i adds y_i from place low_i on and takes it back at high_i, and
    # the prefix sum of these steps at place n is the sum of y over the rows whose range holds n.
    back = order.argsort(2)
    out = y.new_empty(batch, heads, keys, width)
    for some in _few_heads(y):
        sent = y[:, some].double()
        steps = sent.new_zeros(batch, sent.shape[1], keys + 1, width)
        steps.scatter_add_(2, low.expand(sent.shape), sent)
        steps.scatter_add_(2, high.expand(sent.shape), -sent)
        out[:, some] = (torch.take_along_dim(steps.cumsum(2)[:, :, :keys], back, 2) * weight).to(y)
    return out


def _few_heads(x: Tensor) -> Iterator[slice]:
    """Heads whose float64 sums are small beside what a map holds."""
    step = max(SUMS // max(x[:, :1].numel(), 1), 1)
    return (slice(i, i + step) for i in range(0, x.shape[1], step))


def _ranges(pattern: Pattern, mask: Mask, device: torch.device) -> Ranges | None:
    """The pattern as ranges of keys, behind a mask that is a band; None where it is none."""
    if isinstance(pattern, Fixed | OfMap):
        return None
    assert mask.is_band
    real = torch.ones(1, mask.keys, dtype=torch.bool) if mask.valid_keys is None else mask.valid_keys
    real = real.to(device)
    low, high = mask.lower().to(device)[None], mask.upper().to(device)[None]
    own = torch.arange(mask.queries, device=device)[None] + mask.shift
    order = torch.arange(mask.keys, device=device)[None]
    if isinstance(pattern, Offset):
        low, high = torch.maximum(low, own - pattern.n), torch.minimum(high, own - pattern.n + 1)
    elif isinstance(pattern, OnKeys):
        real = real & pattern.keys.to(device)
    elif isinstance(pattern, Matching):
        return _matching(
            pattern.ids.to(device), mask, real, low, torch.minimum(high, own.clamp(0, mask.keys))
        )
    low = low.clamp(0, mask.keys)
    return Ranges(low, torch.maximum(low, high), real, order)


def _matching(ids: Tensor, mask: Mask, real: Tensor, low: Tensor, high: Tensor) -> Ranges:
    """Keys sorted by token and position: those of one token before a position are neighbours."""

    def tokens(length: int, offset: int) -> Tensor:
        return ids[:, (torch.arange(length, device=ids.device) + offset).clamp(0, ids.shape[1] - 1)]

    of_query, of_key = tokens(mask.queries, mask.query_offset), tokens(mask.keys, mask.key_offset)
    # ids need not be small or positive: their ranks are
    ranks = torch.cat([of_query, of_key], -1).unique(return_inverse=True)[1] * (mask.keys + 1)
    of_query, of_key = ranks.split([mask.queries, mask.keys], -1)
    codes, order = (of_key + torch.arange(mask.keys, device=ids.device)).sort(-1)
    low, high = (torch.searchsorted(codes, (of_query + place).contiguous()) for place in (low, high))
    # beyond the ids nothing matches: no query does, and no key is earlier than a query that could
    asked = torch.arange(mask.queries, device=ids.device) + mask.query_offset < ids.shape[1]
    return Ranges(low, torch.where(asked, torch.maximum(low, high), low), real, order)
