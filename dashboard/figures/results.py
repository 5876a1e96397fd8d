"""Figures of labelled arrays: what is drawn follows from the names and the lengths of their axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headwater.dashboard.figures import panels
from headwater.dashboard.figures.arrange import (
    MOST_NUMBERS,
    MOST_SLICES,
    RUNNING,
    TOKENS,
    Arrangement,
    arrange,
)
from headwater.dashboard.figures.assemble import View, assemble
from headwater.dashboard.figures.heads import head_grid
from headwater.dashboard.figures.labels import cut, escaped, visible
from headwater.dashboard.figures.names import PATCH, grid_of, names_of, tokens_of, with_tokens
from headwater.dashboard.figures.panels import Panel
from headwater.dashboard.figures.pictures import apart, of_patches, patches, pixels
from headwater.dashboard.figures.select import labels_of
from headwater.dashboard.figures.style import SEQUENTIAL
from headwater.dashboard.figures.values import Shown, limits_of, shown
from headwater.lens.errors import AnalysisError

BOUND = {"low", "high"}
SHORT_UNIT = 26  # letters that fit beside the lowest map; a longer unit is in the subtitle too


def array_figure(
    array: xr.DataArray, tokens: Sequence[str], title: str, image: Any = None, name: str = ""
) -> go.Figure:
    """The figure of one array."""
    unit = _unit(array, {}, str(array.name or "value"))
    views = list(_views(with_tokens(array, tokens), unit, image=image))
    if image is None and len(views) == 1 and array.squeeze().dims in (("layer", "head"), ("head", "layer")):
        of = shown(array.squeeze(drop=True), unit)
        if of.kind == "numbers" and np.isfinite(of.array.values).any():
            return head_grid(
                of.array, escaped(title), cut(of.short_unit, SHORT_UNIT), of.limits, subtitle=views[0].told
            )
    return assemble(views, escaped(title), name)


def dataset_figure(data: xr.Dataset, tokens: Sequence[str], title: str, image: Any = None) -> go.Figure:
    """The figure of a Dataset: a menu over its arrays, those with an interval first, single numbers last.

    An array that can not be drawn beside others has an entry that says why.
    """
    if not data.data_vars:
        raise AnalysisError("the Dataset holds no arrays, so there is nothing to draw")
    listings, arrays = _listings(data)
    bounds = {name: ends for name in arrays if (ends := interval(data, name)) is not None}
    taken = {end for ends in bounds.values() for end in ends}
    names = [name for name in arrays if name not in taken and data[name].ndim]
    names.sort(key=lambda name: (name not in bounds, data[name].size == 0))
    few = max(24, MOST_SLICES // len(names)) if len(names) > 1 else MOST_SLICES
    views: list[View] = []
    failed: dict[str, AnalysisError] = {}
    for name in names:
        low, high = bounds.get(name, (None, None))
        array = with_tokens(data[name], tokens)
        unit = _unit(array, data.attrs, name)
        ends = None if low is None or high is None else (data[low], data[high])
        if image is not None and not _patch_axis(array):
            continue
        try:
            drawn = list(_views(array, unit, ends, image, few, MOST_NUMBERS // len(names)))
        except AnalysisError as error:
            if image is not None:
                raise
            failed[name] = error
            continue
        for view in drawn:
            view.label = f"{name} · {view.label}" if view.label else name
            view.told = " · ".join(filter(None, [name, view.told]))
            views.append(view)
    if image is None:
        views += [View(label, [panels.table(columns)], label) for label, columns in listings.items()]
        single = {name: data[name].values[()] for name in arrays if not data[name].ndim}
        if single:
            told = {"name": list(single), "value": list(single.values())}
            views.append(View("single numbers", [panels.table(told)], f"unit: {data.attrs.get('unit', '')}"))
    if not views and failed:
        raise next(iter(failed.values()))
    views += [View(name, [panels.note(str(error))], name) for name, error in failed.items()]
    if not views:
        raise AnalysisError(
            "no array of the result is per patch of an image, so nothing lies over the picture"
        )
    return assemble(views, escaped(title), "")


def _views(
    array: xr.DataArray, unit: str, ends: tuple[xr.DataArray, xr.DataArray] | None = None, image: Any = None,
    most_slices: int = MOST_SLICES, most_numbers: int = MOST_NUMBERS,
) -> Iterator[View]:  # fmt: skip
    """One view for each entry of the menu that the array needs."""
    picture = None if image is None else pixels(image)
    array, ends = _by_head(array), None if ends is None else (_by_head(ends[0]), _by_head(ends[1]))
    squeezed, single = _squeezed(array)
    ends = None if ends is None else tuple(_squeezed(end)[0] for end in ends)  # type: ignore[assignment]
    of = shown(squeezed, unit, *(ends or ()))
    if not of.array.ndim:
        of = _as_line(of)
    if not of.array.size:
        lengths = ", ".join(f"{n} along {dim}" for dim, n in of.array.sizes.items())
        yield View("", [panels.note(f"nothing to draw: {lengths}")])
        return
    patch_axis = _patch_axis(of.array, image is not None)
    if len(patch_axis) == 1 and of.kind == "numbers":  # the class token may hold far more than any patch
        limits, colours = limits_of(of_patches(of.array, *patch_axis))
        of = replace(of, limits=limits, colours=colours)
    if not patch_axis and image is not None:
        raise AnalysisError(
            f"{array.name or 'the result'} has no numbers per patch of an image to lay over a picture"
        )
    plan = arrange(of.array, of.kind, of.low is not None, patch_axis, most_slices, most_numbers)
    fixed = dict.fromkeys(plan.fixed, 0)
    lengths = [range(of.array.sizes[dim]) for dim in plan.slices]
    for places in product(*lengths):
        at = {**fixed, **dict(zip(plan.slices, places, strict=True))}
        yield _view(of, plan, at, single, picture)


def _view(of: Shown, plan: Arrangement, at: dict[str, int], single: list[str], picture: Any) -> View:
    part = of.array.isel(at)
    if of.kind == "numbers" and of.limits[0] < 0 and not (part.values < 0).any():
        of = replace(
            of, limits=(0.0, of.limits[1]), colours=SEQUENTIAL
        )  # white is kept for a zero among signs
    ends = None if of.low is None or of.high is None else (of.low.isel(at), of.high.isel(at))
    made: list[Panel] = []
    for place in range(part.sizes[plan.panels]) if plan.panels else [None]:
        pick: dict[str, int] = {} if place is None or plan.panels is None else {plan.panels: place}
        panel = _panel(
            of, plan, part.isel(pick), None if ends is None else tuple(e.isel(pick) for e in ends), picture
        )
        panel.title = f"{plan.panels} {names_of(part, str(plan.panels))[place]}" if place is not None else ""
        if place is not None and panel.aside:
            panel.title += f" · {panel.aside}"
        made.append(panel)
    if plan.kind == "patches" and plan.panels is None and (beside := apart(part.transpose(*plan.core), of)):
        made[0].title, made[0].aside = "patches", ""
        made.append(beside)
    named = [f"{dim} {_name(of.array, dim, place, at)}" for dim, place in at.items() if dim in plan.slices]
    stays = [
        f"{dim} {_name(of.array, dim, 0, at)} of {of.array.sizes[dim]} (choose with {dim}=…)"
        for dim in plan.fixed
    ]
    remarks = list(dict.fromkeys(panel.remark for panel in made if panel.remark))
    whiskers = ["whiskers from low to high"] if of.low is not None and plan.kind in ("bars", "curves") else []
    long_unit = [f"unit: {escaped(of.unit)}"] if len(of.unit) > SHORT_UNIT else []
    aside = [panel.aside for panel in made if panel.aside and plan.panels is None]
    told = [*named, *stays, *single, *remarks, *aside, *whiskers, *of.remarks, *long_unit]
    return View(" · ".join(named), made, " · ".join(told))


def _panel(of: Shown, plan: Arrangement, part: xr.DataArray, ends: Any, picture: Any) -> Panel:
    part = part.transpose(*plan.core)
    if of.kind == "words":
        alone = {plan.core[0]: names_of(part, plan.core[0]), str(part.name or "value"): part.values}
        return panels.words(part) if len(plan.core) == 2 else panels.table(alone)
    if not np.isfinite(part.values).any():
        return panels.note("no number here is defined")
    if plan.kind == "patches":
        return patches(part, of, picture)
    if plan.kind == "matrix":
        return panels.matrix(part, of)
    return panels.lines(
        part,
        of,
        None if ends is None else tuple(e.transpose(*plan.core) for e in ends),
        plan.kind == "curves",
    )


def _squeezed(array: xr.DataArray) -> tuple[xr.DataArray, list[str]]:
    """The array without its axes of length one, and what they were; a prompt that is alone is not named."""
    alone = [str(dim) for dim in array.dims if array.sizes[dim] == 1]
    squeezed = array.isel(dict.fromkeys(alone, 0))
    told = [
        f"{dim} {names_of(array.isel(batch=0) if 'batch' in array.dims else array, dim)[0]}"
        for dim in alone
        if dim != "batch"
    ]
    taken = [
        str(name) for name, held in array.coords.items()
        if not held.dims and (held.dtype.kind in "iuUO" or name in RUNNING) and name not in alone
    ]  # fmt: skip
    told += [f"{name} {escaped(cut(visible(str(array[name].item()))))}" for name in taken]
    return squeezed, told


def _by_head(array: xr.DataArray) -> xr.DataArray:
    """From head to head in one map: heads that send are the rows, heads that read the columns."""
    if not {"layer", "head", "to_layer", "to_head"} <= set(array.dims):
        return array
    for name, layer, head in (("from", "layer", "head"), ("to", "to_layer", "to_head")):
        heads = [f"{a}.{b}" for a in labels_of(array, layer) for b in labels_of(array, head)]
        array = array.stack({name: (layer, head)}, create_index=False).drop_vars(
            [layer, head], errors="ignore"
        )
        array = array.assign_coords({name: heads})
    return array


def _as_line(of: Shown) -> Shown:
    """A single number as an axis with one place."""
    name = str(of.array.name or "value")
    line = of.array.expand_dims({"": [name]}).rename({"": "number"})
    return Shown(line, of.kind, of.unit, of.limits, of.colours, of.remarks)


def _unit(array: xr.DataArray, of_all: Mapping[Any, Any], name: str) -> str:
    """The unit of an array, else of the Dataset it is from; a number without a unit is called by its name."""
    unit = str(array.attrs.get("unit") or of_all.get("unit") or name)
    return name if unit == "1" else unit


def _name(array: xr.DataArray, dim: str, place: int, at: dict[str, int]) -> str:
    others = {name: i for name, i in at.items() if name != dim}
    return names_of(array.isel(others), dim)[place]


def _patch_axis(array: xr.DataArray, wanted: bool = True) -> tuple[str, ...]:
    """The axis of image patches, or their rows and columns, drawn as a grid; () without.

    An axis of tokens is drawn so where a picture is given, else where no other axis holds tokens and all tokens are
    those of a picture.
    """
    if {"row", "column"} <= set(array.dims):
        return "row", "column"
    one = array.isel(batch=0) if "batch" in array.dims else array
    held = [dim for dim in TOKENS if dim in one.dims]
    if not wanted:
        own = [dim for dim in held if any(map(PATCH.fullmatch, tokens_of(one, dim) or ()))]
        held = own if len(held) == 1 else []
    return next(((dim,) for dim in held if grid_of(one, dim) is not None), ())


def interval(data: xr.Dataset, name: str) -> tuple[str, str] | None:
    """The names of the arrays that bound this one: `low` and `high`, or with the same beginning."""
    begin = name.removesuffix("mean") if name.endswith("mean") else f"{name}_"
    for start in (begin, ""):
        ends = f"{start}low", f"{start}high"
        if not set(ends) <= set(map(str, data.data_vars)) or name in ends:
            continue
        if all(data[end].dims == data[name].dims for end in ends) and (start or _first(data, name)):
            return ends
    return None


def _first(data: xr.Dataset, name: str) -> bool:
    """Whether it is the first array with the axes of `low`: what `low` and `high` bound."""
    same = [str(other) for other, array in data.data_vars.items() if array.dims == data["low"].dims]
    return (
        bool(same)
        and next(other for other in same if other not in BOUND) == name
        and data[name].dtype.kind == "f"
    )


def _listings(data: xr.Dataset) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Arrays over one bare axis with words among them are one table; the names of the others."""
    names = [str(name) for name in data.data_vars]
    listings: dict[str, dict[str, Any]] = {}
    for dim in data.dims:
        alike = [name for name in names if data[name].dims == (dim,) and dim not in data.coords]
        if len(alike) > 1 and data.sizes[dim] and any(data[name].dtype.kind in "USO" for name in alike):
            listings[str(dim)] = {name: data[name].values for name in alike}
    listed = {name for columns in listings.values() for name in columns}
    return listings, [name for name in names if name not in listed]
