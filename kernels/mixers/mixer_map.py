"""`MixerMap`: what every map that is no softmax of scores can be asked: products, windows, rows and shares.

Its weights may be signed, and their rows need not sum to 1. Subclasses give the two products with a vector, and a
window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.kernels.tiles.operands import operand, plain
from headwater.kernels.tiles.shapes import AtKeys, AtQueries, OverKeys, OverQueries, Weights

BLOCK_ELEMENTS = 2**22  # 16 MB of float32: what one step of a product or one block of rows may hold


class MixerMap(ABC):
    """An operator [batch, head, query, key] that is never stored; "head" is a channel where each channel has its map.

    `map @ x` carries numbers of keys to queries, `map.T @ y` those of queries to keys. `tile`, `dense` and `row_blocks`
    give exact weights.
    """

    signed = True

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""

    @abstractmethod
    def gather(self, x: OverKeys) -> AtQueries:
        """`map @ x` with the axes spelled out."""

    @abstractmethod
    def scatter(self, y: OverQueries) -> AtKeys:
        """`map.T @ y` with the axes spelled out."""

    @abstractmethod
    def window(self, rows: slice, columns: slice, heads: Tensor) -> Weights:
        """Weights of plain slices and chosen heads."""

    @property
    def T(self) -> TransposedMixerMap:
        """The operator that carries values of queries to keys: `map.T @ y`."""
        return TransposedMixerMap(self)

    def __matmul__(self, x: Float[Tensor, "*heads key c"]) -> AtQueries:
        """Each query gathers x over the keys; x is [key, c], [batch, key, c] or [batch, head, key, c]."""
        return self.gather(operand(x, self.shape, "key"))

    def tile(self, queries: slice, keys: slice, heads: Sequence[int] | None = None) -> Weights:
        """Exact weights of a window; slices without a step."""
        rows, columns = plain(queries, self.shape[2], "queries"), plain(keys, self.shape[3], "keys")
        chosen = torch.arange(self.shape[1]) if heads is None else torch.as_tensor(heads)
        return self.window(rows, columns, chosen)

    def dense(self, heads: Sequence[int] | None = None) -> Weights:
        """The whole map: quadratic memory, asked for by name."""
        return self.tile(slice(None), slice(None), heads)

    def row_blocks(
        self, heads: Sequence[int] | None = None, elements: int = BLOCK_ELEMENTS
    ) -> Iterator[tuple[slice, Weights]]:
        """All rows, a block at a time, with their weights: every chosen head in each block."""
        batch, n_heads, queries, keys = self.shape
        chosen = range(n_heads) if heads is None else heads
        step = max(elements // max(batch * len(chosen) * keys, 1), 1)
        for begin in range(0, queries, step):
            rows = slice(begin, min(begin + step, queries))
            yield rows, self.tile(rows, slice(None), chosen)

    def mean_shares(
        self, elements: int = BLOCK_ELEMENTS
    ) -> Iterator[tuple[slice, Float[Tensor, "batch row key"]]]:
        """All rows of `mean over heads of |A_ij| / Σ_j |A_ij|`, a block at a time; heads without weight count as 0.

        Each head's row is a share of the position before the mean, so that the scale of a head's values plays no part.
        It takes every weight of every head once: time grows with heads · queries · keys, memory does not.
        """
        batch, heads, queries, keys = self.shape
        rows = min(max(elements // max(batch * keys, 1), 1), 512, queries)
        together = max(elements // max(batch * rows * keys, 1), 1)
        for begin in range(0, queries, rows):
            span = slice(begin, min(begin + rows, queries))
            found = 0.0
            for chosen in torch.arange(heads).split(together):
                size = self.window(span, slice(0, keys), chosen).abs()
                total = size.sum(-1, keepdim=True)
                found = found + (size / torch.where(total > 0, total, 1.0)).sum(1)
            yield span, found / heads  # type: ignore[misc]


@dataclass(frozen=True, eq=False)
class TransposedMixerMap:
    """`map.T`: each key collects values from the queries that read it."""

    map: MixerMap

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, key, query)."""
        batch, heads, queries, keys = self.map.shape
        return (batch, heads, keys, queries)

    def __matmul__(self, y: Float[Tensor, "*heads query c"]) -> AtKeys:
        """Each key collects y from the queries; y is [query, c], [batch, query, c] or [batch, head, query, c]."""
        return self.map.scatter(operand(y, self.map.shape, "query"))
