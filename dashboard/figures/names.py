"""What the places on an axis of a result are called: their tokens, or the labels of the axis, all distinct."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from headwater.dashboard.figures.labels import cut, escaped, token_label, visible
from headwater.lens.errors import AnalysisError

LONGEST = 26
PATCH = re.compile(r"(\d+),(\d+)")  # as records name the patches of an image


def tokens_of(array: xr.DataArray, dim: str) -> list[str] | None:
    """The tokens along an axis, or None where the array does not hold them (or holds them for each prompt)."""
    for name in (f"{dim}_token", "token", f"{dim}_tokens"):
        if dim != "batch" and name in array.coords and array.coords[name].dims == (dim,):
            return [str(token) for token in array.coords[name].values]
    return None


def names_of(array: xr.DataArray, dim: str) -> list[str]:
    """A name for each place on an axis, safe to draw; equal names are told apart by their place."""
    tokens = tokens_of(array, dim)
    if tokens is not None:
        return [
            token_label(token, place) for token, place in zip(tokens, _positions(array, dim), strict=True)
        ]
    if dim not in array.coords:
        return [str(place) for place in range(array.sizes[dim])]
    labels = [_text(value) for value in array.coords[dim].values]
    return [f"{label} ({i})" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


def check_tokens(tokens: Sequence[str], lengths: Mapping[str, int]) -> None:
    """AnalysisError where no axis of tokens is as long as the tokens that were given."""
    held = {dim: lengths[dim] for dim in ("query", "key", "position") if dim in lengths}
    if len(tokens) and len(tokens) not in held.values():
        told = ", ".join(f"{size} along {dim}" for dim, size in held.items()) or "no axis of tokens"
        raise AnalysisError(f"tokens= holds {len(tokens)} texts; the result has {told}")


def with_tokens(array: xr.DataArray, tokens: Sequence[str]) -> xr.DataArray:
    """The array whose token axes of that length are called by `tokens`."""
    for dim in ("query", "key", "position"):
        if len(tokens) and array.sizes.get(dim) == len(tokens):
            array = array.assign_coords({f"{dim}_token": (dim, np.array(tokens, dtype=object))})
    return array


def grid_of(tokens: Sequence[str] | None) -> tuple[int, int, list[int]] | None:
    """Rows and columns of the patches among these tokens, and where the patches stand; None where there are none."""
    found = [PATCH.fullmatch(token) for token in tokens or ()]
    places = [place for place, match in enumerate(found) if match]
    if not places:
        return None
    spots = [(int(match[1]), int(match[2])) for match in found if match]
    rows, columns = (max(spot[i] for spot in spots) + 1 for i in (0, 1))
    if spots != [(row, column) for row in range(rows) for column in range(columns)]:
        raise AnalysisError(
            "the patches do not fill one grid of one image; choose one image, all its patches"
        )
    return rows, columns, places


def _positions(array: xr.DataArray, dim: str) -> list[int]:
    """Where the tokens stand in the text: an axis of some queries carries their positions beside it."""
    for name in ("position", dim):
        if (
            name in array.coords
            and array.coords[name].dims == (dim,)
            and array.coords[name].dtype.kind in "iu"
        ):
            return [int(place) for place in array.coords[name].values]
    return list(range(array.sizes[dim]))


def _text(value: object) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:g}"
    return escaped(cut(visible(str(value)), LONGEST)) if str(value) else "∅"
