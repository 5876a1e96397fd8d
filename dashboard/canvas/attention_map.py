"""One attention map on a canvas: hover, click a pair, drag a window, walk with the arrow keys.

The colour scale and "leave position 0 out" are chosen in the browser and send nothing. A click, a window or a step to
another head is an event; each is handed over once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import streamlit as st
from streamlit.components.v2 import component

from headwater.dashboard.canvas.packing import cells_as_sent, is_triangle, packed, text_of, unseen
from headwater.dashboard.figures.labels import cut, visible
from headwater.dashboard.figures.pooling import MOST_CELLS, Pooled, pool

SCALES = ("linear", "sqrt", "log", "clipped")
LONGEST_STRIP = 64  # tokens a side that are shown as chips
UNCHANGED = 1e-6  # a change of a weight that float32 arithmetic makes by itself

_canvas = component(
    "headwater_attention_map",
    html=text_of("attention_map.html"),
    css=text_of("canvas.css"),
    js=text_of("base.js", "attention_paint.js", "attention_map.js"),
)


def attention_map(
    weights: np.ndarray | Pooled,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    *,
    key: str,
    title: str = "",
    chosen: tuple[int, int] | None = None,
    first: tuple[int, int] = (0, 0),
    causal: bool = False,
    scale: str = "sqrt",
    signed: bool = False,
    floor: float = 0.01,
    received: np.ndarray | None = None,
    entropy: np.ndarray | None = None,
    windowed: bool = False,
    unit: str | None = None,
    alt: str | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any] | None:
    """Draw ``weights`` [query, key] of these tokens, and give what the user did, once, or None.

    - ``{"cell": (query, key)}``: a pair was clicked; in a pooled map, the pair of the largest weight of the block.
    - ``{"token": n, "side": "query" | "key"}``: a token was clicked.
    - ``{"window": (q0, q1, k0, k1)}``: queries q0 to q1 - 1 and keys k0 to k1 - 1 were dragged over;
      ``{"window": None}``: the whole map was asked for.
    - ``{"walk": (layers, heads)}``: a step to a neighbouring head, such as (0, 1).

    All positions are positions in the text: ``first`` is the one of the first query and key that are given, and
    ``chosen`` is outlined. ``causal`` leaves pairs out whose key stands after the query; other masked pairs are NaN.
    ``signed`` maps are changes: the colours run over ± the largest change, or ``floor`` if that is more.
    ``received`` [key] and ``entropy`` [query] are exact margins. ``windowed`` offers the way back to the whole map.
    With ``on_event`` the event goes to it before the script runs, and the return value is None.

    A side above 512 is pooled, and so is said; give a `Pooled` where the weights do not fit into memory.
    Raises ValueError where shapes and tokens do not fit.
    """
    pooled = weights if isinstance(weights, Pooled) else _pooled(weights, signed)
    _check(pooled, query_tokens, key_tokens, received, entropy, scale)
    seen = masked_out(pooled, causal, first)
    values, factor = cells_as_sent(pooled, causal, first, signed)
    labels = [
        [cut(visible(token), 40) for token in tokens[:: pooled.block]]
        for tokens in (query_tokens, key_tokens)
    ]
    header: dict[str, object] = {
        "title": title,
        "alt": described(title, seen, (query_tokens, key_tokens), first, signed) if alt is None else alt,
        "note": remark(seen, signed),
        "rows": pooled.cells.shape[0],
        "columns": pooled.cells.shape[1],
        "shape": list(pooled.shape),
        "block": pooled.block,
        "first": list(first),
        "triangle": is_triangle(pooled, causal, first),
        "factor": factor,
        "signed": signed,
        "floor": floor,
        "scale": scale,
        "unit": unit or ("change" if signed else "weight"),
        "windowed": windowed,
        "chosen": None if chosen is None else [int(chosen[0]), int(chosen[1])],
        "queries": labels[0],
        "keys": labels[1],
        "strips": not pooled.is_pooled and max(pooled.shape) <= LONGEST_STRIP,
        "received": 0 if received is None else len(received),
        "entropy": 0 if entropy is None else len(entropy),
    }
    margins = [np.asarray(values, dtype="<f4") for values in (received, entropy) if values is not None]

    def tell() -> None:
        event = event_of(st.session_state[key].get("event"), pooled, first)
        if event is not None and on_event is not None:
            on_event(event)

    result = _canvas(key=key, data=packed(header, [values, *margins]), on_event_change=tell)
    return None if on_event is not None else event_of(result.event, pooled, first)


def _pooled(weights: np.ndarray, signed: bool) -> Pooled:
    weights = np.asarray(weights, dtype=np.float32)
    if weights.ndim != 2:
        raise ValueError(f"weights must be [query, key]; got the shape {weights.shape}")
    if max(weights.shape) > MOST_CELLS:
        return pool(weights, MOST_CELLS, signed)
    places = np.indices(weights.shape)
    return Pooled(weights, places[0], places[1], 1, weights.shape)


def _check(
    pooled: Pooled,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    received: np.ndarray | None,
    entropy: np.ndarray | None,
    scale: str,
) -> None:
    sides = (len(query_tokens), len(key_tokens))
    wrong = []
    if pooled.shape != sides or 0 in sides:
        wrong.append(f"weights [query, key] are {pooled.shape}, and the tokens {sides}")
    if max(pooled.cells.shape) > MOST_CELLS:
        wrong.append(f"a side has {max(pooled.cells.shape)} cells; the most is {MOST_CELLS}")
    if received is not None and np.shape(received) != sides[1:]:
        wrong.append(f"received [key] must be {sides[1:]}, and is {np.shape(received)}")
    if entropy is not None and np.shape(entropy) != sides[:1]:
        wrong.append(f"entropy [query] must be {sides[:1]}, and is {np.shape(entropy)}")
    if scale not in SCALES:
        wrong.append(f"scale must be one of {', '.join(SCALES)}, and is {scale!r}")
    if wrong:
        raise ValueError("; ".join(wrong))


def masked_out(pooled: Pooled, causal: bool, first: tuple[int, int]) -> Pooled:
    """The same map with NaN where a causal query sees no key of the cell."""
    cells = np.array(pooled.cells, dtype=np.float32)
    if causal:
        cells[unseen(pooled, first)] = np.nan
    return Pooled(cells, pooled.query, pooled.key, pooled.block, pooled.shape)


def remark(pooled: Pooled, signed: bool) -> str:
    """What must be said beside the map: that it is pooled, and that a difference is none."""
    said = []
    known = np.abs(pooled.cells[np.isfinite(pooled.cells)])
    if pooled.is_pooled:
        word = "change" if signed else "weight"
        said.append(f"each cell = largest {word} of {pooled.block} × {pooled.block}")
    if signed and known.max(initial=0.0) <= UNCHANGED:
        said.append("no weight changed by more than 1e-6")
    if not known.size:
        said.append("no query sees a key here")
    return " · ".join(said)


def described(
    title: str,
    pooled: Pooled,
    tokens: tuple[Sequence[str], Sequence[str]],
    first: tuple[int, int] = (0, 0),
    signed: bool = False,
    most: int = 5,
) -> str:
    """A sentence of what is seen, for those who hear it: the largest cells by their tokens."""
    cells = pooled.cells
    size = np.where(np.isfinite(cells), np.abs(cells) if signed else cells, -np.inf).ravel()
    order = [int(place) for place in np.argsort(-size, kind="stable")[:most] if size[place] > 0]
    found = []
    for place in order:
        query, key = int(pooled.query.ravel()[place]), int(pooled.key.ravel()[place])
        value = f"{cells.ravel()[place]:{'+' if signed else ''}.3g}"
        pair = [(query, 0), (key, 1)]
        named = [f"{at + first[side]} {cut(visible(tokens[side][at]))}" for at, side in pair]
        found.append(f"{' to '.join(named)} {value}")
    start = f"{title}. " if title else ""
    size_of = f"{pooled.shape[0]} queries, {pooled.shape[1]} keys. "
    name = "Largest changes" if signed else "Largest weights"
    note = remark(pooled, signed)
    return start + size_of + (f"{name}: {', '.join(found)}." if found else "") + (f" {note}." if note else "")


def event_of(raw: object, pooled: Pooled, first: tuple[int, int]) -> dict[str, Any] | None:
    """What the browser sent, in positions of the text; None where it does not fit this map."""
    if not isinstance(raw, dict) or not raw:
        return None
    ends = (first[0] + pooled.shape[0], first[1] + pooled.shape[1])
    if "window" in raw and raw["window"] is None:
        return {"window": None}
    name = next((name for name in ("cell", "token", "window", "walk") if name in raw), "")
    numbers = raw.get(name)
    numbers = [numbers] if isinstance(numbers, int) else numbers
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        return None
    if name == "cell" and len(numbers) == 2:
        row, column = ((number - start) // pooled.block for number, start in zip(numbers, first, strict=True))
        if not (0 <= row < pooled.cells.shape[0] and 0 <= column < pooled.cells.shape[1]):
            return None
        return {"cell": (int(pooled.query[row, column]) + first[0], int(pooled.key[row, column]) + first[1])}
    if name == "token" and len(numbers) == 1 and raw.get("side") in ("query", "key"):
        side = int(raw["side"] == "key")
        return {"token": numbers[0], "side": raw["side"]} if first[side] <= numbers[0] < ends[side] else None
    if name == "window" and len(numbers) == 4:
        q0, q1, k0, k1 = numbers
        fits = first[0] <= q0 < q1 <= ends[0] and first[1] <= k0 < k1 <= ends[1]
        return {"window": (q0, q1, k0, k1)} if fits else None
    if name == "walk" and len(numbers) == 2 and all(abs(number) <= 1 for number in numbers):
        return {"walk": (numbers[0], numbers[1])}
    return None
