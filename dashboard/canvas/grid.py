"""One number per head as tiles of layers × heads that the keyboard can walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from headwater.dashboard.canvas.head_tiles import Head, draw
from headwater.dashboard.figures.style import DIVERGING
from headwater.dashboard.figures.values import limits_of


def grid(
    values: xr.DataArray,
    *,
    key: str,
    title: str = "",
    unit: str = "",
    limits: tuple[float, float] | None = None,
    chosen: Head | None = None,
    pins: Sequence[Head] = (),
    note: str = "",
    alt: str | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any] | None:
    """Draw ``values`` [layer, head] and give what was clicked, once, or None; events are those of `mosaic`.

    Without ``limits`` the colours run from zero, or symmetrically about zero where a number is negative.
    Missing heads and NaN stay empty. With ``on_event`` the event goes to it before the script runs.
    """
    numbers = np.asarray(values.transpose("layer", "head").values, dtype="<f4")
    layers, heads = (
        [int(at) for at in values[name].values] if name in values.coords else list(range(values.sizes[name]))
        for name in ("layer", "head")
    )
    found, colours = limits_of(numbers.astype(float))
    low, high = limits or found
    signed = low < 0 if limits else colours == DIVERGING
    header: dict[str, object] = {
        "kind": "number",
        "title": title,
        "alt": described(title, numbers, layers, heads, unit) if alt is None else alt,
        "note": note,
        "unit": unit,
        "low": float(low),
        "high": float(high),
        "signed": signed,
    }
    return draw(header, numbers, layers, heads, key=key, chosen=chosen, pins=pins, on_event=on_event)


def described(
    title: str, numbers: np.ndarray, layers: Sequence[int], heads: Sequence[int], unit: str, most: int = 5
) -> str:
    """A sentence of what is seen: the heads of the largest numbers, by their size whatever the sign."""
    places = [(layer, head) for layer in layers for head in heads]
    size = np.where(np.isfinite(numbers), np.abs(numbers), -np.inf).ravel()
    order = [int(place) for place in np.argsort(-size, kind="stable")[:most] if np.isfinite(size[place])]
    found = [f"{places[at][0]}.{places[at][1]} {numbers.ravel()[at]:.3g}" for at in order]
    start = f"{title}. " if title else ""
    if not found:
        return f"{start}No head has a number."
    return f"{start}Largest: {', '.join(found)}{f' ({unit})' if unit else ''}."
