"""How objects show in a notebook: a small table of facts, in which every word is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

LONGEST = 240  # characters of a cell
LEFT = ' style="text-align:left"'


def table(title: str, facts: Mapping[str, object]) -> str:
    """HTML of a title and the facts under it, one a row; what is None or empty is left out.

    >>> "<th" in table("a map", {"heads": 4, "edits": ""}), "edits" in table("a map", {"heads": 4, "edits": ""})
    (True, False)
    """
    told = {name: fact for name, fact in facts.items() if fact is not None and fact != ""}
    rows = "".join(f"<tr><th{LEFT}>{cell(name)}</th><td{LEFT}>{cell(told[name])}</td></tr>" for name in told)
    return f"<div><strong>{cell(title)}</strong><table>{rows}</table></div>"


def listing(names: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """HTML of rows under the names of their columns."""
    lines = ["".join(f"<th{LEFT}>{cell(name)}</th>" for name in names)]
    lines += ["".join(f"<td{LEFT}>{cell(value)}</td>" for value in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def cell(value: object) -> str:
    """Text without tags, without signs that do not print, and not too long. Tokens are words of strangers."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def size(count: float) -> str:
    """A number of bytes for a reader.

    >>> size(3 * 2**20), size(512)
    ('3.0 MiB', '512 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
