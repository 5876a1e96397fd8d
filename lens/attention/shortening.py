"""A sequence that is shorter in some blocks: which tokens a call holds, and how its tensors go there and back.

A hook before a block (edits/prune_tokens.py) takes tokens out of the hidden states and says so here; the attention
function asks. Alone, the block attends over the short sequence. Where somebody looks (a listener, another edit, a tap,
gates) its queries, keys and values are put back at their places, with the removed tokens hidden as padding is: every
position, label and record then means what it means in the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.masks import LazyMask
from headwater.lens.errors import EditError


@dataclass(frozen=True, eq=False)
class Places:
    """Places of the tokens of a short sequence in the whole one, int64 [batch, kept], rising in each row.

    `real` is False for a token that fills up a row that kept fewer than others; it is hidden.
    """

    at: Tensor
    real: Tensor

    @classmethod
    def of(cls, kept: Tensor) -> Places:
        """The places of the True flags [batch, position]."""
        longest = int(kept.sum(-1).max())
        order = (~kept).to(torch.int8).sort(dim=-1, stable=True).indices[:, :longest].sort(-1).values
        return cls(order, kept.gather(1, order))

    def behind(self, first: int, count: int) -> Places:
        """These places and `count` more from `first` on, all real."""
        new = torch.arange(first, first + count).expand(len(self.at), -1)
        return Places(torch.cat([self.at, new], 1), torch.cat([self.real, torch.ones_like(new).bool()], 1))

    def last(self, count: int) -> Places:
        """The last `count` of them."""
        return Places(self.at[:, -count:], self.real[:, -count:])

    def taken(self, x: Tensor, axis: int) -> Tensor:
        """Their entries of x [batch, …] along an axis of positions of the whole sequence."""
        return x.gather(axis, self._index(x, axis))

    def put(self, x: Tensor, axis: int, length: int, fill: float, first: int = 0) -> Tensor:
        """The inverse of `taken`: x at its places in `length` positions that begin at `first`, `fill` elsewhere."""
        shape = list(x.shape)
        shape[axis] = length + 1  # the last one takes what fills up, and what lies before `first`
        lost = ~self.real | (self.at < first)
        there = Places(torch.where(lost, length, self.at - first), self.real)
        found = x.new_full(shape, fill).scatter(axis, there._index(x, axis), x)
        return found.narrow(axis, 0, length)

    def _index(self, x: Tensor, axis: int) -> Tensor:
        axis %= x.dim()
        shape = [1] * x.dim()
        shape[0], shape[axis] = self.at.shape
        wide = list(x.shape)
        wide[axis] = self.at.shape[1]
        return self.at.to(x.device).view(shape).expand(wide)


@dataclass(frozen=True, eq=False)
class Short:
    """One call: `queries` of a sequence of `length` tokens so far, of which this layer knows `columns`; `rows` are the
    places of its queries among them (None: it holds all of its queries)."""

    queries: int
    length: int
    rows: Places | None
    columns: Places

    def fitting(self, keys: int) -> Short:
        """The same for a cache that gave `keys` keys: a sliding window drops the oldest."""
        known = self.columns.at.shape[1]
        if keys > known:
            raise EditError(
                f"PruneTokens: the cache holds {keys} tokens of a layer that kept {known}; begin with the prompt"
            )
        return self if keys == known else replace(self, columns=self.columns.last(keys))

    def sizes(self, given: Tensor | None) -> tuple[int, int]:
        """The numbers of queries and keys of the whole sequence; `given` is the mask that the block was given."""
        if isinstance(given, LazyMask):
            if given.mask.key_offset + given.mask.keys != self.length:
                raise EditError(
                    f"PruneTokens: the model counts {given.mask.key_offset + given.mask.keys} tokens where "
                    f"{self.length} were read, since it counts by a layer that is shorter; generate without a cache: "
                    "use_cache=False"
                )
            return given.mask.queries, given.mask.keys
        return self.queries, self.length

    def held(self, x: Tensor) -> Tensor:
        """What the call holds of x [batch, head, query, d] of the whole sequence."""
        return x if self.rows is None else self.rows.taken(x, 2)

    def hidden(self, mask: Mask) -> Mask:
        """The mask of the whole sequence with the removed tokens hidden."""
        batch = len(self.columns.at)
        keys = self.columns.put(
            torch.ones(batch, self.columns.at.shape[1]), 1, mask.keys, 0.0, mask.key_offset
        )
        rows = mask.valid_queries
        if self.rows is not None:
            kept = self.rows.put(torch.ones(batch, self.rows.at.shape[1]), 1, mask.queries, 0.0) > 0
            rows = kept if rows is None else rows & kept
        shown = keys > 0
        return replace(
            mask,
            valid_keys=shown if mask.valid_keys is None else mask.valid_keys.cpu() & shown,
            valid_queries=rows,
        )

    def narrowed(self, mask: Mask) -> Mask | None:
        """The mask over the tokens that are there; None where it is more than a causal or open one with padding."""
        plain = mask.is_band and mask.left is None and mask.right in (None, 0) and mask.key_offset == 0
        if not plain or mask.query_offset + mask.queries != mask.keys:
            return None
        keys, rows = self.columns.real, self.columns.real if self.rows is not None else None
        if mask.valid_keys is not None:
            keys = keys & self.columns.taken(mask.valid_keys.cpu().expand(len(keys), -1), 1)
        if mask.valid_queries is not None and self.rows is not None:
            rows = self.rows.real & self.rows.taken(mask.valid_queries.cpu().expand(len(keys), -1), 1)
        count, width = (mask.queries if self.rows is None else self.rows.at.shape[1]), keys.shape[1]
        return Mask(
            count, width, None, mask.right, width - count,
            valid_keys=None if bool(keys.all()) else keys,
            valid_queries=mask.valid_queries if rows is None else None if bool(rows.all()) else rows,
        )  # fmt: skip

    def spread(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values at their places in the whole sequence, zero where a token was removed."""
        q = q if self.rows is None else self.rows.put(q, 2, mask.queries, 0.0)
        k, v = (self.columns.put(x, 2, mask.keys, 0.0, mask.key_offset) for x in (k, v))
        return q, k, v


# what is told of one call: the mask of the whole sequence, the map, the values, and the places of the map's columns
Told = Callable[[Mask, AttentionMap, Tensor, Places | None], None]


@dataclass(frozen=True, eq=False)
class Call:
    """What a hook says of the block that runs now: `short` (None: it holds all tokens), and whom to tell what came."""

    model: object
    layer: int
    short: Short | None = None
    tell: Told | None = None


_call: ContextVar[Call | None] = ContextVar("headwater_shortened_call", default=None)


def begin(call: Call | None) -> None:
    """Say which block runs now; None when it ended."""
    _call.set(call)


def of(model: object, layer: int) -> Call | None:
    """What was said of this layer of this part; None if nothing."""
    call = _call.get()
    return call if call is not None and call.model is model and call.layer == layer else None


def at_length(model: object, layer: int, x: Tensor) -> Tensor:
    """States [batch, position, d] at a block, in the whole sequence: NaN for the tokens that its call does not hold."""
    call = of(model, layer)
    short = None if call is None else call.short
    if short is None or short.rows is None or x.shape[1] == short.queries:
        return x
    return short.rows.put(x, 1, short.queries, torch.nan)
