"""`Mask`: which keys a query may see, by a band, padding, documents and, for anything else, a function of indices.

A mask is kept as its description and evaluated one tile at a time, so that no queries × keys tensor exists.
Positions are absolute: query row `i` stands at `query_offset + i`, key column `j` at `key_offset + j` (a cache moves
the offsets).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import and_

import torch
from torch import Tensor

from headwater.kernels.tiles.block import Block

HIDDEN = float("-inf")  # the score of a hidden pair
# (batch, head, query position, key position) index tensors that broadcast together -> bool, True where visible
IndexMask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Mask:
    """Visibility of `keys` columns from `queries` rows.

    A key is visible when `position(query) - left <= position(key) <= position(query) + right` (None: no limit; causal
    is `right=0`), when `valid_keys[batch, key]` holds and when `extra(batch, head, query, key)` does.
    `valid_queries[batch, query]` marks rows that are padding: it hides nothing, but such rows are left out of every
    statistic. `start[batch]` and `stop[batch]` are the absolute positions of the first real token of each batch row and
    of one past its last (None: row 0 of the sequence, and the last query). In cross-attention these are of the keys,
    and `query_start`, `query_stop` the same of the queries. `documents[batch|1, position]` numbers the documents of a
    packed sequence from position 0 on: a pair of different documents is hidden.
    """

    queries: int
    keys: int
    left: int | None = None
    right: int | None = None
    query_offset: int = 0
    key_offset: int = 0
    valid_keys: Tensor | None = None
    valid_queries: Tensor | None = None
    extra: IndexMask | None = None
    start: Tensor | None = None
    stop: Tensor | None = None
    documents: Tensor | None = None
    query_start: Tensor | None = None
    query_stop: Tensor | None = None

    def __post_init__(self) -> None:
        longest = max(self.queries + self.query_offset, self.keys + self.key_offset)
        given = self.documents
        if given is not None and (given.dim() != 2 or given.shape[1] < longest or given.is_floating_point()):
            raise ValueError(
                f"documents must be whole numbers [batch, at least {longest} positions], got {given.dtype} "
                f"{tuple(given.shape)}"
            )
        for name, tensor, length in (
            ("valid_keys", self.valid_keys, self.keys),
            ("valid_queries", self.valid_queries, self.queries),
        ):
            if tensor is not None and (
                tensor.dim() != 2 or tensor.shape[1] != length or tensor.dtype != torch.bool
            ):
                raise ValueError(
                    f"{name} must be bool [batch, {length}], got {tensor.dtype} {tuple(tensor.shape)}"
                )

    @property
    def shift(self) -> int:
        """Column at which a query's own position lies, less its row."""
        return self.query_offset - self.key_offset

    @property
    def is_band(self) -> bool:
        return self.beyond_band is None

    @property
    def beyond_band(self) -> str | None:
        """The part of the mask beyond band and padding, in words; None where there is none."""
        if self.extra is not None:
            return "a mask given as a function"
        return None if self.documents is None else "document blocks"

    def told(self) -> str:
        """Which keys a query sees, in words."""
        limits = (self.left, self.right)
        behind, ahead = ("all" if limit is None else f"{limit}" for limit in limits)
        band = {(None, 0): "causal", (None, None): "all tokens"}.get(
            limits, f"{behind} tokens behind and {ahead} ahead"
        )
        padding = None if self.valid_keys is None else "padding hidden"
        return ", ".join(filter(None, (band, padding, self.beyond_band)))

    def real(self, axis: str) -> tuple[Tensor, Tensor]:
        """First absolute position of each row's real tokens and one past the last, int64 [batch|1], by axis."""
        crossing = self.query_stop is not None
        start, stop = (
            (self.query_start, self.query_stop) if crossing and axis == "query" else (self.start, self.stop)
        )
        end = self.key_offset + self.keys if crossing else self.query_offset + self.queries
        start = torch.zeros(1, dtype=torch.long) if start is None else start.cpu()
        return start, torch.full_like(start, end) if stop is None else stop.cpu()

    def lower(self) -> Tensor:
        """First column the band allows for each row, int64 [query], clamped to [0, keys]."""
        rows = torch.arange(self.queries)
        if self.left is None:
            return torch.zeros_like(rows)
        return (rows + self.shift - self.left).clamp(0, self.keys)

    def upper(self) -> Tensor:
        """One past the last column the band allows for each row, int64 [query], clamped to [0, keys]."""
        rows = torch.arange(self.queries)
        if self.right is None:
            return torch.full_like(rows, self.keys)
        return (rows + self.shift + self.right + 1).clamp(0, self.keys)

    def key_span(self, begin: int, end: int) -> tuple[int, int]:
        """The columns outside of which the band hides everything from the rows `begin:end`."""
        first = 0 if self.left is None else min(max(begin + self.shift - self.left, 0), self.keys)
        last = self.keys if self.right is None else min(max(end + self.shift + self.right, 0), self.keys)
        return first, max(first, last)

    @cached_property
    def span(self) -> tuple[int, int]:
        """The columns outside of which the band hides everything from every row."""
        return self.key_span(0, self.queries)

    def interior(self, rows: slice, columns: slice) -> tuple[int, int]:
        """Columns `begin:end` within `columns` that every row of `rows` sees; empty where the band does not tell."""
        if not self.is_band or self.valid_keys is not None:
            return columns.start, columns.start
        begin, end = columns.start, columns.stop
        if self.left is not None:
            begin = max(begin, rows.stop - 1 + self.shift - self.left)
        if self.right is not None:
            end = min(end, rows.start + self.shift + self.right + 1)
        return begin, max(begin, end)

    def tile(self, block: Block, device: torch.device) -> Tensor | None:
        """Visible pairs of one block, bool broadcastable to [batch, head, row, column]; None where all are visible."""
        row, column = block.positions(device)
        query, key = row + self.query_offset, column + self.key_offset
        rows, columns = block.rows, block.columns
        seen = []
        if self.right is not None and columns.stop - 1 - rows.start - self.shift > self.right:
            seen.append(key <= query + self.right)
        if self.left is not None and columns.start - (rows.stop - 1) - self.shift < -self.left:
            seen.append(key >= query - self.left)
        if self.valid_keys is not None:
            seen.append(block.of_keys(self.valid_keys).to(device))
        if self.documents is not None:
            of_query = block.of_queries(self.documents[:, self.query_offset :])
            of_key = block.of_keys(self.documents[:, self.key_offset :])
            seen.append((of_query == of_key).to(device))
        if self.extra is not None:
            index = torch.arange(block.batch.start, block.batch.stop, device=device)[:, None, None, None]
            head = block.heads.to(device)[None, :, None, None]
            seen.append(self.extra(index, head, query, key))
        return reduce(and_, seen) if seen else None

    def visible_keys(self, batch: int, heads: int) -> Tensor:
        """How many keys each row sees, int64 [batch|1, head|1, query]."""
        if not self.is_band:
            return self._count(batch, heads, over_queries=False)
        low, high = self.lower(), self.upper().clamp_min(0)
        if self.valid_keys is None:
            return (high - low).clamp_min(0)[None, None]
        total = torch.nn.functional.pad(self.valid_keys.cpu().long().cumsum(-1), (1, 0))
        return (total[:, high.clamp_min(0)] - total[:, low]).clamp_min(0)[:, None]

    def seen_by(self, batch: int, heads: int) -> Tensor:
        """How many rows that are not padding see each key, int64 [batch|1, head|1, key]."""
        if not self.is_band:
            return self._count(batch, heads, over_queries=True)
        columns = torch.arange(self.keys)
        first = torch.zeros_like(columns) if self.right is None else (columns - self.shift - self.right)
        last = (
            torch.full_like(columns, self.queries)
            if self.left is None
            else columns - self.shift + self.left + 1
        )
        first, last = first.clamp(0, self.queries), last.clamp(0, self.queries)
        if self.valid_queries is None:
            count = (last - first).clamp_min(0)[None]
        else:
            total = torch.nn.functional.pad(self.valid_queries.cpu().long().cumsum(-1), (1, 0))
            count = (total[:, last] - total[:, first]).clamp_min(0)
        if self.valid_keys is not None:
            count = count * self.valid_keys.cpu()
        return count[:, None]

    def first_visible(self, batch: int, heads: int) -> Tensor:
        """Column of the first key each row sees, int64 [batch|1, head|1, query]; `keys` where it sees none."""
        if not self.is_band:
            found = [
                torch.where(tile.any(-1), tile.to(torch.int8).argmax(-1), self.keys)
                for _, tile in self._row_tiles(batch, heads)
            ]
            return torch.cat(found, -1)
        low, high = self.lower(), self.upper()
        if self.valid_keys is None:
            return torch.where(low < high, low, self.keys)[None, None]
        columns = torch.arange(self.keys)
        real = torch.where(self.valid_keys.cpu(), columns, self.keys)
        following = real.flip(-1).cummin(-1).values.flip(-1)
        following = torch.nn.functional.pad(following, (0, 1), value=self.keys)[:, low]
        return torch.where(following < high, following, self.keys)[:, None]

    def own_key(self) -> Tensor:
        """Whether each row's own position is one of the real keys that the band shows, bool [batch|1, query]."""
        column = torch.arange(self.queries) + self.shift
        shown = (self.left is None or self.left >= 0) and (self.right is None or self.right >= 0)
        inside = ((column >= 0) & (column < self.keys) & shown)[None]
        if self.valid_keys is None or not self.keys:
            return inside
        return inside & self.valid_keys.cpu()[:, column.clamp(0, self.keys - 1)]

    def trimmed(self, first: int, last: int) -> Mask:
        """The same mask over the columns `first:last` alone."""
        valid = None if self.valid_keys is None else self.valid_keys[:, first:last]
        return replace(self, keys=last - first, key_offset=self.key_offset + first, valid_keys=valid)

    def _row_tiles(self, batch: int, heads: int):
        """Visibility of 64 rows at a time over all columns, for masks that are more than a band."""
        for begin in range(0, self.queries, 64):
            rows = slice(begin, min(begin + 64, self.queries))
            block = Block(slice(0, batch), torch.arange(heads), rows, slice(0, self.keys))
            tile = self.tile(block, torch.device("cpu"))
            shape = (batch, heads, rows.stop - rows.start, self.keys)
            yield rows, (torch.ones(()) > 0 if tile is None else tile).expand(shape)

    def _count(self, batch: int, heads: int, over_queries: bool) -> Tensor:
        if not over_queries:
            return torch.cat([tile.sum(-1) for _, tile in self._row_tiles(batch, heads)], -1)
        total = torch.zeros(batch, heads, self.keys, dtype=torch.long)
        for rows, tile in self._row_tiles(batch, heads):
            if self.valid_queries is not None:
                tile = tile & self.valid_queries[:, rows].cpu()[:, None, :, None]
            total += tile.sum(-2)
        return total
