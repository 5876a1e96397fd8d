"""One number per head as tiles of layers × heads that the keyboard can walk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import xarray as xr

from headwater.dashboard.canvas.head_tiles import Look, draw
from headwater.dashboard.figures.style import DIVERGING
from headwater.dashboard.figures.values import limits_of


def grid(
    values: xr.DataArray,
    unit: str = "",
    limits: tuple[float, float] | None = None,
    **look: Unpack[Look],
) -> dict[str, Any] | None:
    """Draw ``values`` [layer, head]; events are those of `head_tiles.draw`.

    Without ``limits`` the colours run from zero, or symmetrically about zero where a number is negative.
    Missing heads and NaN stay empty.
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
        "unit": unit,
        "low": float(low),
        "high": float(high),
        "signed": signed,
    }
    return draw(header, numbers, layers, heads, described(numbers, layers, heads, unit), **look)


def described(
    numbers: np.ndarray, layers: Sequence[int], heads: Sequence[int], unit: str, most: int = 5
) -> str:
    """A sentence of what is seen: the heads of the largest numbers, by their size whatever the sign."""
    places = [(layer, head) for layer in layers for head in heads]
    size = np.where(np.isfinite(numbers), np.abs(numbers), -np.inf).ravel()
    order = [int(place) for place in np.argsort(-size, kind="stable")[:most] if np.isfinite(size[place])]
    found = [f"{places[at][0]}.{places[at][1]} {numbers.ravel()[at]:.3g}" for at in order]
    if not found:
        return "No head has a number."
    return f"Largest: {', '.join(found)}{f' ({unit})' if unit else ''}."
