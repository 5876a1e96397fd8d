"""One number per token as small bars of plain HTML, for which the browser needs no library."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from headwater.dashboard.figures.labels import cut, short, visible
from headwater.dashboard.figures.style import BEFORE

MOST = 96  # bars; of more tokens each bar is the largest of a block
NAMED = 24  # tokens whose names fit below their bars


def small_bars(values: np.ndarray, tokens: Sequence[str], unit: str, alt: str, height: int = 120) -> str:
    """HTML of one bar per token, with its number where the pointer rests; ``values`` [token] are not negative.

    >>> small_bars(np.array([1.0, 0.5]), ["a", "b"], "share", "shares").count("share")
    3
    """
    values = np.nan_to_num(np.asarray(values, dtype=float))
    block = -(-len(values) // MOST)
    places = [first + int(values[first : first + block].argmax()) for first in range(0, len(values), block)]
    most = max(float(values.max(initial=0.0)), 1e-12)
    bars = "".join(_bar(place, float(values[place]) / most, values, tokens, unit) for place in places)
    names = "".join(_name(tokens[place]) for place in places) if len(places) <= NAMED else ""
    row = "display:flex;gap:2px;align-items:flex-end"
    return (
        f'<div role="img" aria-label="{html.escape(alt)}">'
        f'<div style="font-size:.75rem;opacity:.75">at most {most:.3g} {html.escape(unit)}</div>'
        f'<div style="{row};height:{height}px;border-bottom:1px solid currentColor">{bars}</div>'
        f'<div style="{row};align-items:flex-start;font-size:.7rem">{names}</div></div>'
    )


def _bar(place: int, share: float, values: np.ndarray, tokens: Sequence[str], unit: str) -> str:
    told = f"{place} {cut(visible(tokens[place]), 24)}: {values[place]:.3f} {unit}"
    size = f"flex:1;min-width:1px;height:{100 * share:.1f}%;background:{BEFORE}"
    # what is pointed at is the whole column, also above a low bar
    return (
        f'<div title="{html.escape(told)}" style="flex:1;height:100%;display:flex;align-items:flex-end">'
        f'<div style="{size}"></div></div>'
    )


def _name(token: str) -> str:
    style = "flex:1;min-width:0;writing-mode:vertical-rl;display:flex;align-items:center;line-height:1"
    return f'<div style="{style}">{html.escape(cut(short(token), 10))}</div>'
