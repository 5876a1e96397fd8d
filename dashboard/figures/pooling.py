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
        for offset in range(weights.shape[0]):
            position = (where.start or 0) + offset
            best, at = _pool_row(np.asarray(weights[offset], dtype=np.float32), block, columns, signed)
            row = position // block
            held = np.abs(cells[row]) if signed else cells[row]
            better = np.isnan(held) | ((np.abs(best) if signed else best) > held)
            better &= ~np.isnan(best)
            cells[row, better], query[row, better], key[row, better] = best[better], position, at[better]
    return Pooled(cells, query, key, block, shape)


def _pool_row(row: np.ndarray, block: int, columns: int, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    padded = np.full(columns * block, np.nan, dtype=np.float32)
    padded[: len(row)] = row
    padded = padded.reshape(columns, block)
    size = np.abs(padded) if signed else padded
    chosen = np.argmax(np.where(np.isnan(size), -np.inf, size), axis=1)
    best = padded[np.arange(columns), chosen]
    return best, np.arange(columns) * block + chosen


def pool(weights: np.ndarray, most: int = MOST_CELLS, signed: bool = False) -> Pooled:
    """Pool a map that lies in memory as [query, key]."""
    queries, keys = weights.shape
    return pool_blocks([(slice(0, queries), weights)], (queries, keys), most, signed)
