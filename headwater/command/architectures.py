"""The table of `headwater doctor --models`: printed, and written into docs/models.md between its two marks.

Numbers keep one digit: a table made anew differs only where something changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headwater.lens.errors import HeadwaterError
from headwater.lens.files import read_text, write_text

if TYPE_CHECKING:
    from headwater.lens.loading.coverage import Row

MOST_PAGE_BYTES = 2**24
BEGIN, END = "<!-- made by headwater doctor --models --write -->", "<!-- end -->"
NUMBERS = ("plain", "right", "left", "cache", "static", "maps", "attention_edit", "head_edit")
HEADINGS = (
    "architecture", "parts", "outputs", "padded right", "padded left", "with a cache", "static cache",
    "recorded weights", "attention edit", "head edit", "verdict",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """One line of the table, as text."""
    numbers = [number(getattr(row, name)) for name in NUMBERS]
    verdict = "WRONG" if row.faults else "read only" if row.head_edit == "refused" else "works"
    verdict = "refused" if row.refusal else verdict
    return [row.title, row.parts, *numbers, verdict]


def number(value: float | str | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if value == 0 or value >= 1 else f"{value:.0e}".replace("e-0", "e-")


def table(rows: Iterable[Row]) -> list[str]:
    """The table in Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *map(cells, rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def read(text: str) -> dict[str, list[str]]:
    """Architecture → its cells, of the table in a page."""
    lines = [
        line for line in text.partition(BEGIN)[2].partition(END)[0].splitlines() if line.startswith("| ")
    ]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {line[0]: line for line in split}


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put the table into a page that has the two marks, or make a page of it."""
    write_between(path, BEGIN, table(rows))


def write_between(path: Path, begin: str, lines: Iterable[str]) -> None:
    """Put lines into a page between `begin` and the next `END`; a page that does not exist is made."""
    made = "\n".join([begin, "", *lines, "", END])
    old = (
        read_text(path, MOST_PAGE_BYTES, HeadwaterError) if path.exists() else f"# Models\n\n{begin}\n{END}\n"
    )
    before, first, rest = old.partition(begin)
    _, end, after = rest.partition(END)
    if not first or not end:
        raise HeadwaterError(f"{path} has no place for the table: it needs the lines {begin} and {END}")
    write_text(path, before + made + after, HeadwaterError)
