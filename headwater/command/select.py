"""`--select role=induction`: one value of an axis of a result, for what is printed and drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr

from headwater.lens.errors import AnalysisError, nearest

VARIABLE = "variable"  # the name under which one array of a dataset is chosen
DRAWN = ("layer", "head", "query", "key")
SHOWN = 12


def select(result: Any, given: Iterable[str]) -> Any:
    """The result at `axis=value` of each text: a label of the axis, else a position counted from 0 or from the end."""
    for text in given:
        axis, equals, value = text.partition("=")
        if not equals:
            raise AnalysisError(f"--select {text!r} has no value; write {text}=VALUE")
        if not isinstance(result, xr.DataArray | xr.Dataset):
            raise AnalysisError("--select takes one value of an axis; this result is a graph, which has none")
        result = _chosen(result, axis, value)
    return result


def advice(array: xr.DataArray) -> str:
    """How to select from an array with too many axes to be drawn; empty where selecting does not help."""
    axes = [str(axis) for axis in array.dims if array.sizes[axis] > 1]
    others = [axis for axis in axes if axis not in DRAWN] or axes
    if len(axes) < 3:
        return ""
    return f"; --select {others[0]}={_labels(array, others[0])[0]} takes one ({_known(array, others[0])})"


def _chosen(result: xr.DataArray | xr.Dataset, axis: str, value: str) -> xr.DataArray | xr.Dataset:
    if isinstance(result, xr.Dataset) and axis == VARIABLE:
        if value not in result.data_vars:
            raise AnalysisError(
                f"--select: the result has no {value!r}: {nearest(value, map(str, result.data_vars))}"
            )
        return result[value].assign_attrs({**result.attrs, **result[value].attrs})
    axes = [str(name) for name in result.dims]
    if axis not in axes:
        several = [VARIABLE] if isinstance(result, xr.Dataset) and len(result.data_vars) > 1 else []
        raise AnalysisError(f"--select: the result has no axis {axis!r}: {nearest(axis, [*axes, *several])}")
    labels = _labels(result, axis)
    if value in labels:
        return result.isel({axis: labels.index(value)})
    if (
        value.lstrip("-").isdigit()
        and axis not in result.indexes
        and -len(labels) <= int(value) < len(labels)
    ):
        return result.isel({axis: int(value)})
    raise AnalysisError(f"--select: {axis} has no {value!r}; {_known(result, axis)}")


def _labels(result: xr.DataArray | xr.Dataset, axis: str) -> list[str]:
    values = result[axis].values if axis in result.indexes else np.arange(result.sizes[axis])
    return [str(value) for value in values]


def _known(result: xr.DataArray | xr.Dataset, axis: str) -> str:
    labels = _labels(result, axis)
    more = f" … {labels[-1]}" if len(labels) > SHOWN else ""
    return f"{axis}: {', '.join(labels[:SHOWN])}{more}"
