"""Patterns that an edit mixes into a map: uniform, an offset, some keys, equal tokens, given weights, another map.

A pattern gives the tile of its weights, 0 on hidden pairs, and is normalised per row over the keys that the mask lets
the row see (another map is taken as it is). Score edits hide nothing from a pattern. Positions are absolute: row i
stands at `query_offset + i`. Cost: one tile at a time. Behind a band their products take linear time
(pattern_products.py), but for `Fixed` and `OfMap`. `Fixed` and `Matching` hold what they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask


class BlockReader(Protocol):
    """A map that gives its weights block by block, [batch, head, row, column]."""

    @property
    def mask(self) -> Mask: ...

    def block(self, block: Block) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Uniform:
    """The same weight on every visible key."""

    as_it_is: ClassVar[bool] = False

    def tile(self, block: Block, mask: Mask, like: Tensor) -> Tensor:
        return _visible(like.new_ones(1, 1, 1, 1), block, mask)


@dataclass(frozen=True, eq=False)
class Offset:
    """All weight on the key `n` positions before the query, where it is visible: 0 is the own position."""

    n: int
    as_it_is: ClassVar[bool] = False

    def tile(self, block: Block, mask: Mask, like: Tensor) -> Tensor:
        rows, columns = block.positions(like.device)
        return _visible((rows + mask.shift - self.n == columns).to(like), block, mask)


@dataclass(frozen=True, eq=False)
class OnKeys:
    """The same weight on every visible one of these keys, bool [batch|1, key]."""

    keys: Tensor
    as_it_is: ClassVar[bool] = False

    def tile(self, block: Block, mask: Mask, like: Tensor) -> Tensor:
        return _visible(block.of_keys(self.keys).to(like), block, mask)


@dataclass(frozen=True, eq=False)
class Matching:
    """The same weight on every earlier visible key of the query's own token; `ids` [batch|1, position] from 0 on.

    Positions beyond the ids match nothing.
    """

    ids: Tensor
    as_it_is: ClassVar[bool] = False

    def tile(self, block: Block, mask: Mask, like: Tensor) -> Tensor:
        ids = self.ids.to(like.device)
        rows, columns = block.positions(like.device)
        of_query, of_key = (
            ids[:, (torch.arange(length, device=ids.device) + offset).clamp(0, ids.shape[1] - 1)]
            for length, offset in ((mask.queries, mask.query_offset), (mask.keys, mask.key_offset))
        )
        # an earlier key of a known query is known too
        known = rows + mask.query_offset < ids.shape[1]
        earlier = columns + mask.key_offset < rows + mask.query_offset
        same = block.of_queries(of_query) == block.of_keys(of_key)
        return _visible((same & known & earlier).to(like), block, mask)


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
        def read(there: Block) -> Tensor:
            return there.of_columns(there.of_maps(self.weights[:, :, there.rows])).to(like)

        offsets = mask.query_offset, mask.key_offset
        return _visible(moved(read, block, offsets, self.weights.shape[2:]), block, mask)


@dataclass(frozen=True, eq=False)
class OfMap:
    """The weights of another map at the same absolute positions, as they are, on the keys visible here.

    The other map has as many batch rows and heads; rows and keys that it does not have get no weight.
    """

    map: BlockReader
    as_it_is: ClassVar[bool] = True

    def tile(self, block: Block, mask: Mask, like: Tensor) -> Tensor:
        other = self.map.mask
        offsets = mask.query_offset - other.query_offset, mask.key_offset - other.key_offset
        shape = other.queries, other.keys
        return _visible(
            moved(lambda there: self.map.block(there).to(like), block, offsets, shape), block, mask
        )


Pattern = Uniform | Offset | OnKeys | Matching | Fixed | OfMap


def moved(
    read: Callable[[Block], Tensor], block: Block, offsets: tuple[int, int], shape: tuple[int, ...]
) -> Tensor:
    """Weights of another map of this shape, whose rows and keys of the same position are `offsets` further on.

    0 on the rows and keys that it does not have.
    """
    rows, above, below = _within(block.rows, offsets[0], shape[0])
    columns, before, after = _within(block.columns, offsets[1], shape[1])
    there = Block(block.batch, block.heads, rows, columns)
    if block.chosen is None:
        return torch.nn.functional.pad(read(there), (before, after, above, below))
    chosen = block.chosen + offsets[1]
    chosen = chosen if chosen.shape[2] == 1 else chosen[:, :, above : chosen.shape[2] - below]
    inside = (chosen >= 0) & (chosen < shape[1])
    found = read(there._replace(chosen=chosen.clamp(0, shape[1] - 1)))
    return torch.nn.functional.pad(found * inside.to(found), (0, 0, above, below))


def _within(span: slice, offset: int, length: int) -> tuple[slice, int, int]:
    """The part of a span that another tensor has, and how many places before and after it are missing there."""
    first, last = (min(max(place + offset, 0), length) for place in (span.start, span.stop))
    before = min(max(-(span.start + offset), 0), span.stop - span.start)
    return slice(first, last), before, span.stop - span.start - before - (last - first)


def _visible(weights: Tensor, block: Block, mask: Mask) -> Tensor:
    """Weights with 0 where the mask hides, [batch|1, head|1, row, column]."""
    seen = mask.tile(block, weights.device)
    weights = weights.expand(*weights.shape[:2], *block.size)
    return weights if seen is None else weights * seen
