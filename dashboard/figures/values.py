"""The values of an array as a figure can show them: numbers with their colours and limits, flags, or words.

An infinite number has no colour and no height. It is left out, as an undefined one is, and counted in a remark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from headwater.dashboard.figures.style import DIVERGING, SEQUENTIAL
from headwater.lens.errors import AnalysisError

LONGEST_UNIT = 44
LOW_HIGH = ("low", "high")


@dataclass(frozen=True)
class Shown:
    """`array` holds floats (NaN: empty) or text; `low` and `high`, of the same shape, are the ends of an interval."""

    array: xr.DataArray
    kind: Literal["numbers", "flags", "words"]
    unit: str
    limits: tuple[float, float]
    colours: str
    remarks: tuple[str, ...] = ()
    low: xr.DataArray | None = None
    high: xr.DataArray | None = None

    @property
    def short_unit(self) -> str:
        """The unit without its explanations, for an axis."""
        first = self.unit
        for mark in (";", " (", ", "):
            if len(first) > LONGEST_UNIT:
                first = first.partition(mark)[0]
        return first if len(first) <= LONGEST_UNIT else first[: LONGEST_UNIT - 1] + "…"


def shown(
    array: xr.DataArray, unit: str, low: xr.DataArray | None = None, high: xr.DataArray | None = None
) -> Shown:
    """What is drawn of an array. AnalysisError where its values are neither numbers, flags nor text."""
    array, low, high = _split_bounds(array, low, high)
    if array.dtype.kind == "b":
        return Shown(array.astype(float), "flags", unit, (0.0, 1.0), "Blues")
    if array.dtype.kind in "USO":
        words = array.copy(
            data=np.vectorize(str, otypes=[object])(array.values) if array.size else array.values
        )
        return Shown(words, "words", unit, (0.0, 1.0), SEQUENTIAL)
    if array.dtype.kind not in "fiu":
        raise AnalysisError(
            f"{array.name or 'the array'} is {array.dtype}; a figure draws real numbers, flags or text"
        )
    numbers = array.values.astype(np.float64 if array.dtype.kind != "f" else array.dtype)
    infinite, undefined = int(np.isinf(numbers).sum()), int(np.isnan(numbers).sum())
    if infinite:
        numbers = np.where(np.isinf(numbers), np.nan, numbers)
    remarks = [f"{undefined} undefined, left empty"] if undefined else []
    remarks += [f"{infinite} infinite, left empty"] if infinite else []
    limits, colours = limits_of(numbers)
    return Shown(array.copy(data=numbers), "numbers", unit, limits, colours, tuple(remarks), low, high)


def limits_of(numbers: np.ndarray) -> tuple[tuple[float, float], str]:
    """Colour limits and scale: symmetric about zero where a number is negative, else from zero."""
    known = numbers[np.isfinite(numbers)]
    if not known.size:
        return (0.0, 1.0), SEQUENTIAL
    low, high = float(known.min()), float(known.max())
    if low < 0:
        most = max(-low, high)
        return (-most, most), DIVERGING
    return (0.0, high or 1.0), SEQUENTIAL


def _split_bounds(
    array: xr.DataArray, low: xr.DataArray | None, high: xr.DataArray | None
) -> tuple[xr.DataArray, xr.DataArray | None, xr.DataArray | None]:
    """An axis that holds an estimate, "low" and "high" becomes an interval about the estimate."""
    for dim in array.dims:
        labels = [str(label) for label in array[dim].values] if dim in array.coords else []
        middle = [label for label in labels if label not in LOW_HIGH]
        if len(middle) == 1 and set(LOW_HIGH) <= set(labels):
            of = {label: array.isel({dim: labels.index(label)}, drop=True) for label in labels}
            return of[middle[0]], of["low"], of["high"]
    return array, low, high
