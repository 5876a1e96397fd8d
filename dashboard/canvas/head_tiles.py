"""Layers × heads with one tile a head, walked by arrow keys: small maps (`mosaic`) or numbers (`grid`) draw on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Required, TypedDict, Unpack

import numpy as np
import streamlit as st
from streamlit.components.v2 import component

from headwater.dashboard.canvas.packing import packed, text_of

Head = tuple[int, int]

_tiles = component(
    "headwater_head_tiles",
    html=text_of("head_tiles.html"),
    css=text_of("canvas.css"),
    js=text_of("base.js", "head_tiles.js"),
)


class Look(TypedDict, total=False):
    """What tiles of maps and of numbers have in common. ``alt`` stands in for the sentence of what is seen, ``height``
    bounds a low picture of numbers, in pixels of the page."""

    key: Required[str]
    title: str
    chosen: Head | None
    pins: Sequence[Head]
    note: str
    alt: str | None
    height: int | None
    on_event: Callable[[dict[str, Any]], None] | None


def draw(
    header: dict[str, object],
    values: np.ndarray,
    layers: Sequence[int],
    heads: Sequence[int],
    seen: str,
    **look: Unpack[Look],
) -> dict[str, Any] | None:
    """Mount the tiles, and give what was clicked, once, or None; ``seen`` says what they show.

    ``{"head": (layer, head)}`` is a click or Enter, ``{"pin": (layer, head)}`` the same with Shift or Ctrl.
    With ``on_event`` the event goes to it before the script runs.
    """
    key, chosen, pins, on_event = look["key"], look.get("chosen"), look.get("pins", ()), look.get("on_event")
    alt, title = look.get("alt"), look.get("title", "")
    header = header | {
        "title": title,
        "note": look.get("note", ""),
        "height": look.get("height"),
        "alt": f"{title}. {seen}" if alt is None and title else alt or seen,
        "layers": [int(layer) for layer in layers],
        "heads": [int(head) for head in heads],
        "chosen": None if chosen is None else [int(part) for part in chosen],
        "pins": [[int(part) for part in pin] for pin in pins],
    }

    def tell() -> None:
        event = event_of(st.session_state[key].get("event"), layers, heads)
        if event is not None and on_event is not None:
            on_event(event)

    result = _tiles(key=key, data=packed(header, [values]), on_event_change=tell)
    return None if on_event is not None else event_of(result.event, layers, heads)


def event_of(raw: object, layers: Sequence[int], heads: Sequence[int]) -> dict[str, Any] | None:
    """What the browser sent, or None where it names no head of these."""
    if not isinstance(raw, dict):
        return None
    name = "pin" if "pin" in raw else "head"
    place = raw.get(name)
    if not (isinstance(place, list) and len(place) == 2 and all(type(part) is int for part in place)):
        return None
    return {name: (place[0], place[1])} if place[0] in layers and place[1] in heads else None
