"""`AttentionMap`: a layer's attention maps as an operator, from what defines them, never as stored maps.

It holds the rotated queries and keys, the score rule, the row log-sum-exp and the row factors of the weight edits:
O(S·d) numbers. Products, tiles, rows and statistics are computed exactly when they are asked for; `dense()` alone
builds the whole queries × keys tensor. Rows that are padding, or that see no key, are rows of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headwater.kernels.backends import blocked, flash_edits, linear
from headwater.kernels.backends.triton import backend as triton_backend
from headwater.kernels.edits import Shares, WeightStep
from headwater.kernels.maps import pairs, received, statistics, summaries
from headwater.kernels.rules.rule import ScoreRule


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """Maps of one layer: `q` [batch, head, query, d_head], `k` [batch, kv head, key, d_head], `lse` like q less d_head.

    Build it with `AttentionMap.of`, which marks the rows that have no weights.
    """

    q: Tensor
    k: Tensor
    rule: ScoreRule
    lse: Tensor
    steps: tuple[WeightStep, ...] = ()
    backend: str = "auto"
    # row statistics that came out of the forward pass already, with the conventions of kernels/maps/statistics.py
    known: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        rule: ScoreRule,
        lse: Tensor,
        steps: tuple[WeightStep, ...] = (),
        backend: str = "auto",
        known: Mapping[str, Tensor] | None = None,
    ) -> AttentionMap:
        """From a forward pass: rows that are padding or see nothing get lse = +inf, hence no weights."""
        silent = lse == float("-inf")
        # scores that overflowed are not a row without weights
        lse = lse.masked_fill(lse == float("inf"), torch.nan)
        if rule.mask.valid_queries is not None:
            silent = silent | ~rule.mask.valid_queries[:, None].to(lse.device)
        return cls(q, k, rule, lse.masked_fill(silent, float("inf")), steps, backend, known or {})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        return (self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2])

    @property
    def T(self) -> TransposedMap:
        """The operator that carries values of queries to keys: `map.T @ y`."""
        return TransposedMap(self)

    def __matmul__(self, x: Tensor) -> Tensor:
        """Each query gathers x over the keys → [batch, head, query, c]; x is [key, c], [batch, key, c] or has heads."""
        x = _operand(x, self.shape, self.shape[3], "key")
        engine = self.engine()
        if engine == "triton":
            x = x.to(self.q.device)
            return triton_backend.gather(self.q, self.k, self.rule, self.lse, self.steps, x)
        if engine == "flash":
            return flash_edits.gather(self.q, self.k, self.rule, self.lse, self.steps, x.to(self.q.device))
        if engine == "running":
            return linear.gather(self.q, self.k, self.rule, self.lse, x.to(self.q.device))
        batch, heads, queries, _ = self.shape
        out = self.q.new_zeros(batch, heads, queries, x.shape[-1], dtype=self._high)
        for block in blocked.blocks(batch, range(heads), self.rule):
            values = _rows(x, block)[:, :, block.columns].to(out)
            out[block.batch, block.heads, block.rows] = self.block(block) @ values
        return out

    def tile(self, queries: slice, keys: slice, heads: list[int] | None = None) -> Tensor:
        """Exact weights of a window, [batch, head, query, key] in float32; slices without a step."""
        rows, columns = (
            _plain(s, n, name)
            for s, n, name in ((queries, self.shape[2], "queries"), (keys, self.shape[3], "keys"))
        )
        chosen = torch.arange(self.shape[1]) if heads is None else torch.tensor(heads)
        block = blocked.Block(slice(0, self.shape[0]), chosen, rows, columns)
        return self.block(block).float()

    def dense(self, heads: list[int] | None = None) -> Tensor:
        """The whole map [batch, head, query, key]: quadratic memory, asked for by name."""
        return self.tile(slice(0, self.shape[2]), slice(0, self.shape[3]), heads)

    def row_blocks(
        self, heads: list[int] | None = None, elements: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """All rows, a block at a time: (rows, weights [batch, head, row, key]), every chosen head in each block."""
        chosen = list(range(self.shape[1])) if heads is None else heads
        batch, _, queries, keys = self.shape
        budget = blocked.BLOCK_ELEMENTS if elements is None else elements
        step = max(budget // max(batch * len(chosen) * keys, 1), 1)
        for begin in range(0, queries, step):
            rows = slice(begin, min(begin + step, queries))
            yield rows, self.tile(rows, slice(0, keys), chosen)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest weights of each row and their columns, [batch, head, query, k]; 0 and -1 beyond the last."""
        return summaries.topk(self, k)

    def pooled(self, block: int, how: str = "max") -> Tensor:
        """The map in cells of block × block weights, "max" or "mean" of each: [batch, head, query cell, key cell]."""
        return summaries.pooled(self, block, how)

    @property
    def signed(self) -> bool:
        """Whether weights may be negative."""
        return self.rule.signed and not any(isinstance(step.edit, Shares) for step in self.steps)

    def shares(self) -> AttentionMap:
        """The map of |w| / (sum of |w| over the row + 1e-8), in blocks of rows; one pass for the sums."""
        batch, heads = self.shape[:2]
        edit = Shares(torch.ones(heads, dtype=torch.bool))
        factor = torch.full_like(self.lse, -1.0)
        for block in blocked.blocks(batch, range(heads), self.rule):
            weights = self.block(block)
            live = ~torch.isinf(self.lse[block.batch][:, block.heads, block.rows])
            (found,) = edit.resolve(weights, block, self.rule.mask, live)
            factor[block.batch, block.heads, block.rows] = found.to(factor)
        steps = (*self.steps, WeightStep(edit, (factor,)))
        return replace(self, steps=steps, backend="blocked", known={})

    def statistic(
        self, name: str, groups: Tensor | None = None, window: int = statistics.WINDOW, of: str = "weights"
    ) -> Tensor:
        """One statistic (kernels/maps/statistics.py lists them and their units)."""
        return self.statistics((name,), groups, window, of)[name]

    def statistics(
        self, names: tuple[str, ...], groups: Tensor | None = None, window: int = statistics.WINDOW,
        of: str = "weights",
    ) -> dict[str, Tensor]:  # fmt: skip
        """Several statistics in one pass, `of` the "weights" as they are or of their "shares" (one pass more)."""
        if of not in ("weights", "shares"):
            raise ValueError(f"statistics are of 'weights' or of 'shares'; got of={of!r}")
        return statistics.compute(self.shares() if of == "shares" else self, names, groups, window)

    def received(
        self, queries: slice | Tensor | None = None, later: tuple[int, int] | None = None,
        heads: list[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """Sum of the weights that some queries put on each key, [batch, head, key] (kernels/maps/received.py)."""
        return received.received(self, queries, later, heads)

    def visible(self, queries: slice | Tensor | None = None, later: tuple[int, int] | None = None) -> Tensor:
        """How many of these queries see each key, int64 [batch, head, key]: what `received` is divided by."""
        return received.visible(self, queries, later)

    def at(self, columns: Tensor) -> Tensor:
        """Exact weights at some key columns of each row, [batch, head, query, n] (kernels/maps/pairs.py)."""
        return pairs.at(self, columns)

    def stripe(self, offset: int) -> Tensor:
        """Weight of each query on the key `offset` positions before it, [batch, head, query]; 0 where there is none."""
        return pairs.stripe(self, offset)

    def block(self, block: blocked.Block) -> Tensor:
        """Weights of one block of the row loop, [batch, head, row, column], in float32 or float64."""
        return blocked.weights(self.q, self.k, self.rule, self.lse, self.steps, block)

    @property
    def _high(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def engine(self, transposed: bool = False) -> str:
        """The backend of products and statistics: the one asked for, else the fused one of the device if it can."""
        if self.backend == "blocked":
            return "blocked"
        edits = [step.edit for step in self.steps]
        if self.backend == "auto" and linear.refuses(self.rule, edits) is None:
            return "running"
        fused = "flash" if self.backend == "auto" else self.backend
        if fused == "triton":
            reason = triton_backend.refuses(self.rule, self.q, edits)
        else:
            reason = flash_edits.refuses(self.rule, self.q, edits, transposed, self.k)
        if reason and self.backend == fused:
            raise ValueError(f"{fused} can not compute {reason}; use backend='blocked'")
        return "blocked" if reason else fused


@dataclass(frozen=True, eq=False)
class TransposedMap:
    """`map.T`: each key collects values from the queries that attend to it."""

    map: AttentionMap

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, key, query)."""
        batch, heads, queries, keys = self.map.shape
        return (batch, heads, keys, queries)

    def __matmul__(self, y: Tensor) -> Tensor:
        """y [query, c], [batch, query, c] or [batch, head, query, c] → [batch, head, key, c]."""
        source = self.map
        batch, heads, queries, keys = source.shape
        y = _operand(y, source.shape, queries, "query").to(source.q.device)
        engine = source.engine(transposed=True)
        if engine == "triton":
            return triton_backend.scatter(source.q, source.k, source.rule, source.lse, source.steps, y)
        if engine == "flash":
            y = y.expand(batch, heads, -1, -1)
            return flash_edits.scatter(source.q, source.k, source.rule, source.lse, source.steps, y)
        if engine == "running":
            return linear.scatter(source.q, source.k, source.rule, source.lse, y)
        out = source.q.new_zeros(batch, heads, keys, y.shape[-1], dtype=source._high)
        for block in blocked.blocks(batch, range(heads), source.rule):
            values = _rows(y, block)[:, :, block.rows].to(out)
            out[block.batch, block.heads, block.columns] += source.block(block).mT @ values
        return out


def _operand(x: Tensor, shape: tuple[int, int, int, int], length: int, axis: str) -> Tensor:
    """x as [batch, head|1, length, c]; an error states the shapes that fit."""
    batch, heads = shape[:2]
    given = tuple(x.shape)
    if x.dim() == 2:
        x = x[None, None]
    elif x.dim() == 3:
        x = x[:, None]
    if x.dim() != 4 or x.shape[2] != length or x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads):
        raise ValueError(
            f"the operand must be [{axis}, c], [batch, {axis}, c] or [batch, head, {axis}, c] with "
            f"batch={batch}, head={heads}, {axis}={length}; got {given}"
        )
    return x.expand(batch, -1, -1, -1)


def _rows(x: Tensor, block: blocked.Block) -> Tensor:
    x = x[block.batch]
    return x if x.shape[1] == 1 else x[:, block.heads]


def _plain(given: slice, length: int, name: str) -> slice:
    begin, end, step = given.indices(length)
    if step != 1:
        raise ValueError(f"{name} must be a slice without a step, got {given}")
    return slice(begin, max(begin, end))
