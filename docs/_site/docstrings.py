"""Docstrings as autodoc reads them: plain text with code in single backticks becomes reStructuredText.

The docstrings are written to be read in a terminal. Here code keeps its characters, everything else that
reStructuredText would read as markup is escaped, and the labelled lines ("Cost: …") become a list of fields.
"""

from __future__ import annotations

import re

from headwater.analyses._catalogue.catalogue import catalogue
from headwater.analyses._catalogue.settings import Setting

LABELS = ("Question", "Unit", "Source", "Cost", "Not for")
CODE = re.compile(r"`([^`]+)`")
BULLET = re.compile(r"\s*(?:- |\d+\. )")


def as_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring, block by block."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    return [*"\n\n".join(_block(block) for block in blocks).split("\n"), ""]


def process(app, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """The listener for autodoc: `lines` are replaced in place."""
    lines[:] = as_rst(lines)
    found_in = name.removeprefix("headwater.analyses.")
    if found_in != name and found_in in catalogue():
        lines += ["Settings:", "", *map(_setting, catalogue()[found_in].settings), ""]


def _setting(setting: Setting) -> str:
    limits = ", ".join(setting.choices) or f"{setting.kind}{setting.bounds}"
    none = " or none" if setting.optional else ""
    help = f": {_escaped(setting.help)}" if setting.help else ""
    return f"- ``{setting.name}`` ({limits}{none}){help}"


def _block(block: str) -> str:
    if block.lstrip().startswith(">>>"):
        return block
    out: list[str] = []
    inside = ""
    for line in _escaped(block).split("\n"):
        label = next((each for each in LABELS if line.startswith(f"{each}: ")), None)
        if label:
            if not inside and out:
                out.append("")
            inside = label
            out.append(f":{label}: {line.removeprefix(label + ': ')}")
        elif inside:
            out.append(f"    {line}")
        else:
            # a list that follows its sentence at once
            if BULLET.match(line) and out and out[-1] and not BULLET.match(out[-1]) and out[-1][0] != " ":
                out.append("")
            out.append(line)
    return "\n".join(out)


def _escaped(text: str) -> str:
    out, last = [], 0
    for found in CODE.finditer(text):
        out.append(_plain(text[last : found.start()]))
        code = re.sub(r"\s+", " ", found[1].strip())
        before = "\\ " if text[found.start() - 1 : found.start()].isalnum() else ""
        after = "\\ " if re.match(r"\w", text[found.end() : found.end() + 1]) else ""
        out.append(f"{before}``{code}``{after}")
        last = found.end()
    return "".join([*out, _plain(text[last:])])


def _plain(text: str) -> str:
    return re.sub(r"([\\*|]|_(?!\w))", r"\\\1", text)
