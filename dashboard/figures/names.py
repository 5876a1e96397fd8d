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
        part = array.coords.get(f"{dim}_part")
        if part is not None and part.dims == (dim,):  # both sides of a model stand on one axis
            tokens = [f"{side}: {token}" for side, token in zip(part.values, tokens, strict=True)]
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


def grid_of(array: xr.DataArray, dim: str) -> tuple[int, int, list[int]] | None:
    """Rows and columns of the patches along an axis, and where the patches stand; None where there are none.

    The coordinates beside the axis say so, such as `key_row` and `key_column`; else tokens that are named "row,column".
    """
    held = [array.coords.get(f"{dim}_{name}") for name in ("row", "column")]
    if all(each is not None and each.dims == (dim,) for each in held):
        for name, told in (("image", "pictures"), ("frame", "frames")):
            if f"{dim}_{name}" in array.coords and int(array.coords[f"{dim}_{name}"].max()) > 0:
                raise AnalysisError(
                    f"the result is of several {told}; hw.on_grid(result) makes pictures of it"
                )
        found = [
            tuple(map(int, spot))
            for spot in zip(*(each.values for each in held if each is not None), strict=True)
        ]
    else:
        matches = [PATCH.fullmatch(token) for token in tokens_of(array, dim) or ()]
        found = [(int(match[1]), int(match[2])) if match else (-1, -1) for match in matches]
    places = [place for place, (row, _) in enumerate(found) if row >= 0]
    if not places:
        return None
    spots = [found[place] for place in places]
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
