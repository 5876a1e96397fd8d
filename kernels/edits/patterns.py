"""Patterns that an edit mixes into a map: uniform, an offset, some keys, equal tokens, given weights, another map.

A pattern gives the tile of its weights, 0 on hidden pairs, and is normalised per row over the keys that the mask lets
the row see (another map is taken as it is). Score edits hide nothing from a pattern. Positions are absolute: row i
stands at `query_offset + i`. Cost: one tile at a time. Behind a band their products take linear time
(pattern_products.py), but for `Fixed` and `OfMap`. `Fixed` and `Matching` hold what they are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask

if TYPE_CHECKING:
    from headwater.kernels.maps.attention_map import AttentionMap


@dataclass(frozen=True, eq=False)
class Uniform:
    """The same weight on every visible key."""

    as_it_is: ClassVar[bool] = False

    def tile(self, block: Block, mask: Mask, like: Tensor) -> Tensor:
        return _visible(torch.ones((), device=like.device, dtype=like.dtype), block, mask)


@dataclass(frozen=True, eq=False)
class Offset:
    """All weight on the key `n` positions before the query, where it is visible: 0 is the own position."""

    n: int
    as_it_is: ClassVar[bool] = False

    def tile(self, block: Block, mask: Mask, like: Tensor) -> Tensor:
        rows, columns = block.positions(like.device)
        return _visible((rows + mask.shift - self.n == columns).to(like)[None, None], block, mask)


@dataclass(frozen=True, eq=False)
class OnKeys:
    """The same weight on every visible one of these keys, bool [batch|1, key]."""

    keys: Tensor
    as_it_is: ClassVar[bool] = False

    def tile(self, block: Block, mask: Mask, like: Tensor) -> Tensor:
        keys = block.of_keys(self.keys).to(like)[:, None, None]
        return _visible(keys.expand(-1, 1, block.rows.stop - block.rows.start, -1), block, mask)


@dataclass(frozen=True, eq=False)
class Matching:
    """The same weight on every earlier visible key of the query's own token; `ids` [batch|1, position] from 0 on.

    Positions beyond the ids match nothing.
    """

    ids: Tensor
    as_it_is: ClassVar[bool] = False

    def tile(self, block: Block, mask: Mask, like: Tensor) -> Tensor:
        rows, columns = (
            place + offset
            for place, offset in zip(
                block.positions(like.device), (mask.query_offset, mask.key_offset), strict=True
            )
        )
        ids = block.of_batch(self.ids).to(like.device)
        known = [(place >= 0) & (place < ids.shape[1]) for place in (rows, columns)]
        query, key = (ids[:, place.clamp(0, ids.shape[1] - 1)] for place in (rows, columns))
        same = (query == key) & known[0] & known[1] & (columns < rows)
        return _visible(same[:, None].to(like), block, mask)


@dataclass(frozen=True, eq=False)
class Fixed:
    """Given weights, [batch|1, head|1, query, key] at positions from 0 on, renormalised over the visible keys.

    Rows and keys outside of what was given have no weight. Weights must be finite and not negative.
    """

    weights: Tensor
    as_it_is: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.weights.dim() != 4 or not ((self.weights >= 0) & (self.weights < torch.inf)).all():
            raise ValueError(
                "the weights of a pattern must be [batch|1, head|1, query, key], finite and not negative; got "
                f"{tuple(self.weights.shape)} from {self.weights.min():.3g} to {self.weights.max():.3g}"
            )

    def tile(self, block: Block, mask: Mask, like: Tensor) -> Tensor:
        given = block.of_batch(self.weights)
        given = given if given.shape[1] == 1 else given[:, block.heads.to(given.device)]
        rows = _within(block.rows, mask.query_offset, given.shape[2])
        columns = _within(block.columns, mask.key_offset, given.shape[3])
        found = given[:, :, rows.inside, columns.inside].to(like)
        return _visible(_placed(found, rows, columns), block, mask)


@dataclass(frozen=True, eq=False)
class OfMap:
    """The weights of another map at the same absolute positions, as they are, on the keys visible here.

    The other map has as many batch rows and heads; rows and keys that it does not have get no weight.
    """

    map: AttentionMap
    as_it_is: ClassVar[bool] = True

    def tile(self, block: Block, mask: Mask, like: Tensor) -> Tensor:
        other = self.map.rule.mask
        rows = _within(block.rows, mask.query_offset - other.query_offset, other.queries)
        columns = _within(block.columns, mask.key_offset - other.key_offset, other.keys)
        there = self.map.block(Block(block.batch, block.heads, rows.inside, columns.inside))
        return _visible(_placed(there.to(like), rows, columns), block, mask)


Pattern = Uniform | Offset | OnKeys | Matching | Fixed | OfMap


@dataclass(frozen=True)
class _Overlap:
    """The part of a block's span that another tensor has: `inside` it, with `before` and `after` places missing."""

    inside: slice
    before: int
    after: int


def _within(span: slice, offset: int, length: int) -> _Overlap:
    first, last = (min(max(place + offset, 0), length) for place in (span.start, span.stop))
    before = min(max(-(span.start + offset), 0), span.stop - span.start)
    return _Overlap(slice(first, last), before, span.stop - span.start - before - (last - first))


def _placed(found: Tensor, rows: _Overlap, columns: _Overlap) -> Tensor:
    return torch.nn.functional.pad(found, (columns.before, columns.after, rows.before, rows.after))


def _visible(weights: Tensor, block: Block, mask: Mask) -> Tensor:
    """Weights with 0 where the mask hides, [batch|1, head|1, row, column]."""
    seen = mask.tile(block.rows, block.columns, block.batch, block.heads, weights.device)
    shape = (1, 1, block.rows.stop - block.rows.start, block.columns.stop - block.columns.start)
    weights = weights if weights.dim() == 4 else weights.expand(shape)
    return weights if seen is None else weights * seen
