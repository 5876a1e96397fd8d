"""What a canvas is sent: one block of bytes, a JSON header followed by the numbers it announces.

A weight travels as float16, and a causal square map as its lower triangle: 0.27 MB at 512 × 512. Masked pairs are NaN
in a rectangle and absent from a triangle. Weights above 1 and changes are divided by the largest first, so that
float16 keeps three digits of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from headwater.dashboard.figures.pooling import Pooled


def text_of(*names: str) -> str:
    """The text of files of this folder, one after the other."""
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


def packed(header: dict[str, object], arrays: Sequence[np.ndarray]) -> bytes:
    """Length of the header (4 bytes), the header padded to whole 4 bytes, then the arrays, each padded the same way."""
    text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
    parts = [len(text).to_bytes(4, "little"), _padded(text)]
    parts += [_padded(np.ascontiguousarray(array).tobytes()) for array in arrays]
    return b"".join(parts)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def unseen(pooled: Pooled, first: tuple[int, int]) -> np.ndarray:
    """Which cells hold no pair that a causal query sees: every key of the cell stands after every query of it."""
    rows, columns = pooled.cells.shape
    last_query = np.minimum((np.arange(rows) + 1) * pooled.block, pooled.shape[0]) - 1 + first[0]
    first_key = np.arange(columns) * pooled.block + first[1]
    return first_key[None, :] > last_query[:, None]


def is_triangle(pooled: Pooled, causal: bool, first: tuple[int, int]) -> bool:
    rows, columns = pooled.cells.shape
    return causal and rows == columns and first[0] == first[1]


def cells_as_sent(
    pooled: Pooled, causal: bool, first: tuple[int, int], signed: bool = False
) -> tuple[np.ndarray, float]:
    """The cells as float16, row after row, and the factor that gives the weights back."""
    cells = np.array(pooled.cells, dtype=np.float32)
    if causal:
        cells[unseen(pooled, first)] = np.nan
    largest = float(np.abs(cells[np.isfinite(cells)]).max(initial=0.0))
    factor = largest if largest and (signed or largest > 1) else 1.0
    cells = np.where(np.isfinite(cells), cells, np.nan) / np.float32(factor)
    if is_triangle(pooled, causal, first):
        cells = cells[np.tril_indices(cells.shape[0])]
    return cells.astype("<f2").ravel(), factor
