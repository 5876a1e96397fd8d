"""`AttentionMap`: a layer's attention maps as an operator that never stores the maps.

It holds the rotated queries and keys, the score rule, the row log-sum-exp and the row factors of the weight edits:
O(S·d) numbers. Products, tiles, rows and statistics are computed exactly when they are asked for; `dense()` alone
builds the whole queries × keys tensor. Rows that are padding, or that see no key, are rows of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from headwater.kernels.backends.choose import choose_for
from headwater.kernels.edits.weights import Shares, WeightStep
from headwater.kernels.maps import pairs, received, statistics, summaries
from headwater.kernels.notebook import size, table
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.threads import mapped
from headwater.kernels.tiles import row_blocks
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.operands import operand, plain
from headwater.kernels.tiles.shapes import AtKeys, AtQueries, Groups, PerKey, PerQuery, Weights

Rows = slice | Bool[Tensor, " query"] | Bool[Tensor, "#batch query"]


@dataclass(frozen=True, eq=False)
class AttentionMap(MapState):
    """A layer's maps and all that can be asked of them. Build it with `AttentionMap.of`.

    >>> import torch
    >>> import headwater as hw
    >>> map = hw.load("tasks-4l").record("When Mary and John went to the store").map(0)
    >>> map.shape  # (batch, head, query, key)
    (1, 8, 9, 9)
    >>> map.tile(slice(0, 2), slice(0, 9), heads=[3]).shape
    torch.Size([1, 1, 2, 9])
    >>> (map @ torch.ones(9, 1)).shape  # every query gathers one number over the keys
    torch.Size([1, 8, 9, 1])
    """

    def __repr__(self) -> str:
        return f"AttentionMap({_size(self.shape)}, {self.backend})"

    def _repr_html_(self) -> str:
        rule, held = self.rule, [self.q, self.k, self.lse]
        facts = {
            "key heads": self.k.shape[1], "features": self.q.shape[-1],
            "scale": rule.scale, "visible": rule.mask.told(),
            "soft cap": rule.softcap, "normaliser": None if rule.normaliser is None else rule.normaliser.name,
            "learned sinks": "yes" * (rule.sinks is not None), "ALiBi": "yes" * (rule.alibi is not None),
            "edits": ", ".join(type(each).__name__ for each in (*rule.edits, *(step.edit for step in self.steps))),
            "memory": f"{size(sum(x.numel() * x.element_size() for x in held))}; "
            f"the dense maps would take {size(4 * math.prod(self.shape))}",
        }  # fmt: skip
        return table(repr(self), facts)

    @property
    def T(self) -> TransposedMap:
        """The operator that carries values of queries to keys: `map.T @ y`."""
        return TransposedMap(self)

    def __matmul__(self, x: Float[Tensor, "*heads key c"]) -> AtQueries:
        """Each query gathers x over the keys; x is [key, c], [batch, key, c] or [batch, head, key, c]."""
        x = operand(x, self.shape, "key")
        return choose_for(self).gather(self, x.to(self.q.device))

    def tile(self, queries: slice, keys: slice, heads: list[int] | None = None) -> Weights:
        """Exact weights of a window in float32; slices without a step."""
        rows, columns = (
            plain(s, n, name)
            for s, n, name in ((queries, self.shape[2], "queries"), (keys, self.shape[3], "keys"))
        )
        chosen = torch.arange(self.shape[1]) if heads is None else torch.tensor(heads)
        block = Block(slice(0, self.shape[0]), chosen, rows, columns)
        return self.block(block).float()

    def dense(self, heads: list[int] | None = None) -> Weights:
        """The whole map: quadratic memory, asked for by name."""
        return self.tile(slice(0, self.shape[2]), slice(0, self.shape[3]), heads)

    def row_blocks(
        self, heads: list[int] | None = None, elements: int | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "batch head row key"]]]:
        """All rows, a block at a time, with their weights: every chosen head in each block."""
        chosen = list(range(self.shape[1])) if heads is None else heads
        batch, _, queries, keys = self.shape
        budget = row_blocks.BLOCK_ELEMENTS if elements is None else elements
        step = max(budget // max(batch * len(chosen) * keys, 1), 1)
        for begin in range(0, queries, step):
            rows = slice(begin, min(begin + step, queries))
            yield rows, self.tile(rows, slice(0, keys), chosen)

    def topk(self, k: int) -> tuple[Float[Tensor, "batch head query k"], Int[Tensor, "batch head query k"]]:
        """The k largest weights of each row and their columns; 0 and -1 beyond the last."""
        return summaries.topk(self, k)

    def pooled(self, block: int, how: str = "max") -> Float[Tensor, "batch head query_cell key_cell"]:
        """The map in cells of block × block weights, the "max" or the "mean" of each."""
        return summaries.pooled(self, block, how)

    def shares(self) -> AttentionMap:
        """The map of |w| / (sum of |w| over the row + 1e-8), in blocks of rows; one pass for the sums."""
        edit = Shares(torch.ones(self.shape[1], dtype=torch.bool))
        factor = torch.full_like(self.lse, -1.0)

        def of_block(block: Block) -> tuple[Block, Tensor]:
            live = ~torch.isinf(block.of_rows(self.lse))
            (found,) = edit.resolve(self.block(block), block, self.mask, live)
            return block, found

        for block, found in mapped(of_block, self.row_blocks_of(), self.q.device):
            factor[block.batch, block.heads, block.rows] = found.to(factor)
        steps = (*self.steps, WeightStep(edit, (factor,)))
        return replace(self, steps=steps, backend="blocked", known={})

    def statistic(
        self, name: str, groups: Groups | None = None, window: int = statistics.WINDOW, of: str = "weights"
    ) -> Shaped[Tensor, "batch head *numbers"]:
        """One statistic (kernels/maps/statistics.py lists them and their units)."""
        return self.statistics((name,), groups, window, of)[name]

    def statistics(
        self, names: tuple[str, ...], groups: Groups | None = None, window: int = statistics.WINDOW,
        of: str = "weights",
    ) -> dict[str, Shaped[Tensor, "batch head *numbers"]]:  # fmt: skip
        """Several statistics in one pass, `of` the "weights" as they are or of their "shares" (one pass more)."""
        if of not in ("weights", "shares"):
            raise ValueError(f"statistics are of 'weights' or of 'shares'; got of={of!r}")
        return statistics.compute(self.shares() if of == "shares" else self, names, groups, window)

    def received(
        self, queries: Rows | None = None, later: tuple[int, int] | None = None,
        heads: list[int] | None = None,
    ) -> PerKey:  # fmt: skip
        """Sum of the weights that some queries put on each key (kernels/maps/received.py)."""
        return received.received(self, queries, later, heads)

    def visible(
        self, queries: Rows | None = None, later: tuple[int, int] | None = None
    ) -> Int[Tensor, "batch head key"]:
        """How many of these queries see each key: what `received` is divided by."""
        return received.visible(self, queries, later)

    def at(self, columns: Int[Tensor, "*heads query n"]) -> Float[Tensor, "batch head query n"]:
        """Exact weights at some key columns of each row (kernels/maps/pairs.py)."""
        return pairs.at(self, columns)

    def stripe(self, offset: int) -> PerQuery:
        """Weight of each query on the key `offset` positions before it; 0 where there is none."""
        return pairs.stripe(self, offset)


@dataclass(frozen=True, eq=False)
class TransposedMap:
    """`map.T`: each key collects values from the queries that attend to it."""

    map: AttentionMap

    def __repr__(self) -> str:
        return f"{self.map!r}.T"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, key, query)."""
        batch, heads, queries, keys = self.map.shape
        return (batch, heads, keys, queries)

    def __matmul__(self, y: Float[Tensor, "*heads query c"]) -> AtKeys:
        """Each key collects y from the queries; y is [query, c], [batch, query, c] or [batch, head, query, c]."""
        source = self.map
        y = operand(y, source.shape, "query").to(source.q.device)
        return choose_for(source, transposed=True).scatter(source, y)


def _size(shape: tuple[int, int, int, int]) -> str:
    batch, heads, queries, keys = shape
    return f"{batch} × {heads} heads × {queries} queries × {keys} keys"
