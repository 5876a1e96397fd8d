"""Make a map of many queries and keys small enough to draw, without hiding what is strong in it.

A drawn cell is the largest weight of its block (for signed maps: the one of largest absolute value), never every
n-th weight and never a mean: taking every n-th erases a previous-token head, a mean hides a sink. The price is that
a pooled map overstates how much weight there is, so figures say that it is pooled and carry exact margins.
Blocks of rows are taken one at a time; memory is that of the drawn map plus one block of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

MOST_CELLS = 512


@dataclass(frozen=True)
class Pooled:
    """A drawable map: ``cells[row, column]`` is the weight at (``query[row, column]``, ``key[row, column]``)."""

    cells: np.ndarray
    query: np.ndarray
    key: np.ndarray
    block: int
    shape: tuple[int, int]

    @property
    def is_pooled(self) -> bool:
        return self.block > 1


def pool_blocks(
    blocks: Iterable[tuple[slice, np.ndarray]],
    shape: tuple[int, int],
    most: int = MOST_CELLS,
    signed: bool = False,
) -> Pooled:
    """Pool the rows that ``blocks`` yields as (slice of queries, weights [query, key]) to at most ``most`` a side."""
    queries, keys = shape
    block = max(1, -(-max(queries, keys) // most))
    rows, columns = -(-queries // block), -(-keys // block)
    cells = np.full((rows, columns), np.nan, dtype=np.float32)
    query = np.zeros((rows, columns), dtype=np.int32)
    key = np.zeros((rows, columns), dtype=np.int32)
    for where, weights in blocks:
        first = where.start or 0
        found = _cells_of(np.asarray(weights, dtype=np.float32), first % block, block, columns, signed)
        rows_of = slice(first // block, first // block + len(found[0]))
        best, held = found[0], cells[rows_of]
        sizes = (np.abs(best), np.abs(held)) if signed else (best, held)
        better = ~np.isnan(best) & (np.isnan(held) | (sizes[0] > sizes[1]))
        for whole, part in zip(
            (cells, query, key), (best, first - first % block + found[1], found[2]), strict=True
        ):
            whole[rows_of][better] = part[better]
    return Pooled(cells, query, key, block, shape)


def _cells_of(
    weights: np.ndarray, above: int, block: int, columns: int, signed: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The strongest weight of each cell of some rows, its row and key; `above` rows of the first cell are absent."""
    lines = -(-(above + len(weights)) // block)
    padded = np.full((lines * block, columns * block), np.nan, dtype=np.float32)
    padded[above : above + len(weights), : weights.shape[1]] = weights
    size = np.abs(padded) if signed else padded
    size = np.where(np.isnan(size), -np.inf, size).reshape(lines * block, columns, block)
    row = size.max(2).reshape(lines, block, columns).argmax(1) + block * np.arange(lines)[:, None]
    column = size[row, np.arange(columns)].argmax(2) + block * np.arange(columns)
    return padded[row, column], row, column


def pool(weights: np.ndarray, most: int = MOST_CELLS, signed: bool = False) -> Pooled:
    """Pool a map that lies in memory as [query, key]."""
    queries, keys = weights.shape
    return pool_blocks([(slice(0, queries), weights)], (queries, keys), most, signed)
