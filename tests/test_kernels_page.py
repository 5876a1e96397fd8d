"""The table of passes and bytes on the page of kernels is arithmetic: its numbers follow from their formulas.

Seen to fail with one digit of the page changed.
"""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
LENGTHS, HEADS, WIDTH = (4096, 32768, 131072), 32, 128
BFLOAT16 = 2
UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12}


def row(start: str) -> list[float]:
    line = next(
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {start}")
    )
    cells = [cell.strip() for cell in line.strip("| \n").split("|")][1:]
    found = [re.fullmatch(r"([\d,.]+)(?: (MB|GB|TB))?", cell) for cell in cells]
    return [float(m[1].replace(",", "")) * UNITS.get(m[2] or "", 1.0) for m in found if m]


def near(found: list[float], expected: list[float]) -> bool:
    return len(found) == 3 and all(abs(a - b) <= 0.05 * b for a, b in zip(found, expected, strict=True))


def test_passes_and_bytes_follow_from_their_formulas() -> None:
    assert row("attnread 0.1.2: passes") == [1 + n / WIDTH for n in LENGTHS]
    assert near(row("attnread, interp-engine"), [BFLOAT16 * HEADS * n**2 for n in LENGTHS])
    assert row("Headwater: passes") == [2, 2, 2]
    numbers = 9 * 4 + 2 * 8
    assert near(row("Headwater: bytes of these statistics"), [numbers * HEADS * n for n in LENGTHS])
    kept = 2 * WIDTH * BFLOAT16 + 4
    assert near(row("Headwater: bytes that define"), [kept * HEADS * n for n in LENGTHS])


def test_the_default_statistics_are_as_many_as_the_page_counts() -> None:
    from headwater.kernels.maps import statistics

    whole = {"argmax", "visible"}
    assert len(set(statistics.DEFAULT) - whole) == 9
    assert whole <= set(statistics.DEFAULT)
