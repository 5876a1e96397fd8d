"""The matrix as a table of a page: a line for each family, a column for each analysis, refusals numbered below."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

from headwater.command import architectures, matrix_calls
from headwater.command.matrix import VERSIONS, Cell
from headwater.lens.loading import zoo

BEGIN = "<!-- made by headwater doctor --matrix --write -->"
MARKS = {"right": "✓", "ran": "·", "not tried": "–", "wrong": "✗", "error": "✗"}


def title(row: str) -> str:
    """The family of a row, and its part if that is not the main one."""
    family, _, part = row.partition("/")
    return zoo.FAMILIES[family].title + (f", {part}" if part else "")


def lines(cells: Sequence[Cell]) -> list[str]:
    """The table with its date and versions in front, and behind it the analyses and the lines of the refusals."""
    analyses = list(dict.fromkeys(cell.analysis for cell in cells))
    number = {name: place for place, name in enumerate(analyses, 1)}
    found: dict[str, dict[str, str]] = {}
    notes: dict[str, int] = {}
    for cell in cells:
        refused = cell.state == "refused"
        mark = str(notes.setdefault(plain(cell), len(notes) + 1)) if refused else MARKS[cell.state]
        found.setdefault(title(cell.row), {})[cell.analysis] = mark
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in VERSIONS)
    states = [cell.state for cell in cells]
    told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    heads = ["family", *map(str, number.values())]
    rows = [heads, ["---"] * len(heads), *([row, *marks.values()] for row, marks in found.items())]
    return [
        f"{date.today().isoformat()}, {versions}; {len(found)} rows, {len(analyses)} analyses: {told}.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Columns: " + ", ".join(f"{place} `{name}`" for name, place in number.items()) + ".",
        "",
        "Refusals:",
        "",
        *(f"{place}. {line}" for line, place in notes.items()),
    ]


def plain(cell: Cell) -> str:
    """The line of a refusal without the name of the model, so that families share a note; safe in Markdown."""
    kind = zoo.FAMILIES[cell.row.partition("/")[0]].model
    line = re.sub(rf"\b{kind}\b", "the model", cell.line)
    return re.sub(r"([*_<>|])", r"\\\1", line)


def write(path: Path, cells: Sequence[Cell]) -> None:
    """Put the matrix into a page that has its marks."""
    architectures.write_between(path, BEGIN, lines(cells))


def read(text: str) -> dict[tuple[str, str], str]:
    """(row, analysis) → mark, of the matrix in a page. Rows have their names of `matrix_calls.names`."""
    inside = text.partition(BEGIN)[2].partition(architectures.END)[0]
    columns = re.findall(r"(?:\d+) `(\w+)`", inside.partition("Columns: ")[2])
    table = [line.strip("| ").split(" | ") for line in inside.splitlines() if line.startswith("| ")]
    named = {title(row): row for row in matrix_calls.names()}
    return {
        (named[row], name): mark
        for row, *marks in table[2:]
        if row in named
        for name, mark in zip(columns, marks, strict=True)
    }
