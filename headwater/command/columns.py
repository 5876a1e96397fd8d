"""Rows of cells as aligned lines, without numpy: a list of names must not wait for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def columns(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Rows of cells as lines with aligned columns; numbers to the right."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(not isinstance(row[i], str) for row in rows[1:]) for i in range(len(widths))]
    place = [str.rjust if to_right else str.ljust for to_right in right]
    lines = (
        "  ".join(put(text, n) for put, text, n in zip(place, row, widths, strict=True)) for row in cells
    )
    return [line.rstrip() for line in lines]


def cell(value: Any) -> str:
    """One value as text: four digits of a fraction, – if undefined; control characters escaped for the terminal."""
    if isinstance(value, Real) and not isinstance(value, Integral):  # numpy's numbers are registered as these
        number = float(value)
        if math.isnan(number):
            return "–"
        number += 0.0  # no zero has a sign
        return f"{number:.4f}" if number == 0 or 1e-3 <= abs(number) < 1e5 else f"{number:.3g}"
    text = str(value)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
