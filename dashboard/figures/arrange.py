"""Which axes of an array lie in one panel, which become panels side by side, and which a menu goes through."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import xarray as xr

TOKENS = ("key", "query", "position")
RUNNING = (
    "fraction",
    "step",
    "size",
    "keep",
    "kept",
    "factor",
    "hop",
    "direction",
    "layer",
)  # drawn from left to right, where their labels are numbers
MOST_PANELS, MOST_CURVES, MOST_BARS = 6, 10, 60
MOST_SLICES, MOST_NUMBERS = 200, 1_500_000


@dataclass(frozen=True)
class Arrangement:
    """`core` are the one or two axes of a panel, rows first; `fixed` stay at their first value."""

    kind: str
    core: tuple[str, ...]
    panels: str | None
    slices: tuple[str, ...]
    fixed: tuple[str, ...] = ()


def arrange(
    array: xr.DataArray, kind: str = "numbers", interval: bool = False, patches: tuple[str, ...] = (),
    most_slices: int = MOST_SLICES, most_numbers: int = MOST_NUMBERS,
) -> Arrangement:  # fmt: skip
    """The arrangement of an array without axes of length one; `patches` are axes that are drawn as a picture."""
    sizes = {str(dim): array.sizes[dim] for dim in array.dims}
    if patches:
        drawn, core = "patches", patches
    else:
        running = [dim for dim in RUNNING if dim in sizes and _of_numbers(array, dim)]
        drawn, core = _core(sizes, kind, interval, running)
    outer = [dim for dim in sizes if dim not in core]
    short = [
        dim for dim in outer if sizes[dim] <= MOST_PANELS and not (dim == "batch" and set(core) & {*TOKENS})
    ]
    panels = next(iter(sorted(short, key=lambda dim: dim == "batch")), None)
    slices = [dim for dim in outer if dim != panels]
    fixed: list[str] = []
    while slices and (
        prod(sizes[dim] for dim in slices) > most_slices
        or array.size / prod(sizes[dim] for dim in fixed) > most_numbers
    ):
        fixed.append(slices.pop(slices.index(min(slices, key=lambda dim: (dim != "batch", sizes[dim])))))
    return Arrangement(drawn, core, panels, tuple(slices), tuple(fixed))


def _of_numbers(array: xr.DataArray, dim: str) -> bool:
    return dim not in array.coords or array[dim].dtype.kind not in "OUS"


def _core(
    sizes: dict[str, int], kind: str, interval: bool, running: list[str]
) -> tuple[str, tuple[str, ...]]:
    for pair in (("layer", "head"), ("query", "key")):
        if set(pair) <= set(sizes):
            return "matrix", pair
    free = [dim for dim in sizes if dim != "batch"] or list(sizes)
    by_length = sorted(free, key=lambda dim: -sizes[dim])
    token = next((dim for dim in TOKENS if dim in sizes), None)
    if kind == "words" and len(sizes) == 1:
        return "table", tuple(sizes)
    if token is not None:
        other = next((dim for dim in by_length if dim not in TOKENS), None)
        return ("matrix", (other, token)) if other else ("bars", (token,))
    if running and kind == "numbers":
        others = [dim for dim in (*by_length, *sizes) if dim != running[0]]
        series = next((dim for dim in others if sizes[dim] <= MOST_CURVES), None)
        if series is None and others:
            return "matrix", (others[0], running[0])
        return "curves", (running[0], *([series] if series else []))
    if len(by_length) == 1:
        alone = len(sizes) == 1 or interval
        return ("bars", (by_length[0],)) if alone else ("matrix", ("batch", by_length[0]))
    first, second = by_length[:2]
    if interval and sizes[second] <= MOST_CURVES and sizes[first] * sizes[second] <= MOST_BARS:
        return "bars", (first, second)
    return "matrix", tuple(dim for dim in sizes if dim in (first, second))
