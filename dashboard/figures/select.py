"""One value of an axis of a result, by its label or its place: what `figure(result, role="induction")` draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from headwater.lens.errors import AnalysisError, nearest

VARIABLE = "variable"  # the name under which one array of a Dataset is chosen
SHOWN = 12


def choose(result: Any, chosen: Mapping[str, Any]) -> Any:
    """`result` at each `axis=value`: a label of the axis, else a position counted from 0 or from the end.

    A list of values keeps these, in their order. AnalysisError names the axes, or the values, that there are.
    """
    for axis, value in chosen.items():
        if not isinstance(result, xr.DataArray | xr.Dataset):
            raise AnalysisError(
                f"{axis}={value!r} takes one value of an axis; a {type(result).__name__} has none"
            )
        result = _chosen(result, axis, value)
    return result


def _chosen(result: xr.DataArray | xr.Dataset, axis: str, value: Any) -> xr.DataArray | xr.Dataset:
    if isinstance(result, xr.Dataset) and axis == VARIABLE:
        several, names = isinstance(value, list | tuple), [str(name) for name in result.data_vars]
        for name in value if several else [value]:
            if name not in names:
                raise AnalysisError(f"the result has no {name!r}: {nearest(name, names)}")
        if several:
            return result[list(value)]
        return result[value].assign_attrs({**result.attrs, **result[value].attrs})
    axes = [str(name) for name in result.dims]
    if axis not in axes:
        several = [VARIABLE] if isinstance(result, xr.Dataset) and len(result.data_vars) > 1 else []
        raise AnalysisError(f"the result has no axis {axis!r}: {nearest(axis, [*axes, *several])}")
    if isinstance(value, list | tuple | range | np.ndarray):
        return result.isel({axis: [_place(result, axis, each) for each in value]})
    place = _place(result, axis, value)
    found = result.isel({axis: place})
    held = {*found.coords, *(found.data_vars if isinstance(found, xr.Dataset) else ())}
    return found if axis in held else found.assign_coords({axis: place})  # so that it says what was taken


def _place(result: xr.DataArray | xr.Dataset, axis: str, value: Any) -> int:
    labels, text = labels_of(result, axis), str(value)
    if text in labels:
        return labels.index(text)
    whole = text.lstrip("-").isdigit()
    if whole and axis not in result.indexes and -len(labels) <= int(text) < len(labels):
        return int(text)
    raise AnalysisError(f"{axis} has no {text!r}; {known(result, axis)}")


def labels_of(result: xr.DataArray | xr.Dataset, axis: str) -> list[str]:
    """The label of each place on an axis as text: its coordinate, else its position."""
    values = result[axis].values if axis in result.indexes else np.arange(result.sizes[axis])
    return [str(value) for value in values]


def known(result: xr.DataArray | xr.Dataset, axis: str) -> str:
    """The labels of an axis for a message, the first of them where there are many."""
    labels = labels_of(result, axis)
    more = f" … {labels[-1]}" if len(labels) > SHOWN else ""
    return f"{axis}: {', '.join(labels[:SHOWN])}{more}"
