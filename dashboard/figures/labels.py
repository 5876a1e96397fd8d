"""Labels of tokens that a figure can show as they are, whatever the tokens contain.

Plotly reads a small HTML subset and TeX between dollar signs in every label, and equal categories on an axis melt
into one. So tokens are escaped, numbered by position, cut to a readable length, and axes are always integer.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

NAMED = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
PATCH = re.compile(r"<image(?: \d+)?> (\d+,\d+)")
LONGEST = 17  # "<image 12> 23,23" is whole


def visible(token: str) -> str:
    """The token with everything that a reader could not see made visible."""
    if not token:
        return "∅"
    shown = "".join(_glyph(character) for character in token)
    bare = shown.lstrip(" ")
    if len(bare) < len(shown):
        shown = "·" * (len(shown) - len(bare)) + bare
    return shown


def _glyph(character: str) -> str:
    if character in NAMED:
        return NAMED[character]
    category = unicodedata.category(character)
    if category == "Cc":
        return chr(0x2400 + ord(character)) if ord(character) < 32 else "�"
    if category == "Cs":  # half of a surrogate pair: no encoder takes it
        return "�"
    if category == "Zs" and character != " ":  # spaces of another width
        return f"‹{ord(character):04X}›"
    if category == "Cf" and character != "\u200d":  # text direction and other unseen marks
        return f"‹{ord(character):04X}›"
    return character


def readable(text: str) -> str:
    """A text whose spaces stay spaces, and in which everything else that a reader could not see is made visible."""
    return "".join(letter if letter == " " else visible(letter) for letter in text)


def short(token: str) -> str:
    """The token for a narrow cell: of an image token its row and column alone."""
    found = PATCH.fullmatch(token)
    return visible(found[1] if found else token)


def cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def escaped(text: str) -> str:
    """Text as Plotly must receive it, so that it is shown and not interpreted."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def token_label(token: str, position: int) -> str:
    return f"{position} {escaped(cut(visible(token)))}"


def ticks(
    tokens: Sequence[str], positions: Sequence[int] | np.ndarray, most: int = 48
) -> tuple[list[int], list[str]]:
    """At most ``most`` evenly spaced ticks: the places on the axis and their labels."""
    step = max(1, -(-len(positions) // most))
    places = list(range(0, len(positions), step))
    return places, [token_label(tokens[place], int(positions[place])) for place in places]
