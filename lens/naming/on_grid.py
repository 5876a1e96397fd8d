"""`on_grid`: numbers per token as a picture, one number where each patch stands."""

from __future__ import annotations

import numpy as np
import xarray as xr

from headwater.lens.errors import AnalysisError

AXES = ("key", "query", "position")  # axes of tokens, in the order in which they are tried


def patch_axis(result: xr.DataArray) -> str | None:
    """The axis whose tokens are patches; None without one."""
    return next((dim for dim in AXES if dim in result.dims and f"{dim}_row" in result.coords), None)


def on_grid(result: xr.DataArray, image: int = 0, axis: str | None = None) -> xr.DataArray:
    """A result per token with the axes `row` and `column` in the place of its token axis: [..., row, column].

    A video has the axis `frame` before them. `axis` is "key" (the default, where keys are patches) or "query". Of a
    text with several pictures `image` takes one, counted from 0. Tokens that are no patches are left out. It reads the
    coordinates `key_row`, `key_column` (`key_image`, `key_frame`) that results over patches carry. AnalysisError where
    the tokens are no patches, or where batch rows have grids of different size.

    >>> import headwater as hw, torch, transformers
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    >>> config = transformers.ViTConfig(image_size=(16, 32), patch_size=8, **sizes)
    >>> model = hw.load(transformers.ViTModel(config).eval())
    >>> found = hw.analyses.rollout(model.record(torch.zeros(1, 3, 16, 32)), queries=[0])
    >>> hw.on_grid(found).sizes
    Frozen({'batch': 1, 'query': 1, 'row': 2, 'column': 4})
    """
    if not isinstance(result, xr.DataArray):
        raise AnalysisError(
            f"on_grid takes one array of numbers per token, such as result['score']; got {type(result).__name__}"
        )
    dim = patch_axis(result) if axis is None else axis
    if dim is None or f"{dim}_row" not in result.coords:
        raise AnalysisError(
            f"{result.name or 'the result'} is not per patch of a picture: none of its axes "
            f"{', '.join(map(str, result.dims))} has {dim or 'key'}_row beside it"
        )
    batched = "batch" in result.dims
    rows = range(result.sizes["batch"]) if batched else [0]
    found = [_one(result.isel(batch=row) if batched else result, dim, image, row) for row in rows]
    if len({grid.shape for grid in found}) > 1:
        raise AnalysisError(
            "the pictures of the batch rows have grids of different size; take one, result[[0]]"
        )
    if not batched:
        return found[0]
    together = xr.concat(found, "batch", coords="minimal", compat="override", join="override")
    return together.transpose("batch", *found[0].dims).assign_coords(
        {name: each for name, each in result.coords.items() if each.dims == ("batch",)}
    )


def _one(array: xr.DataArray, dim: str, image: int, batch: int) -> xr.DataArray:
    """The picture of one batch row."""

    def numbers(name: str) -> np.ndarray:
        held = array.coords.get(f"{dim}_{name}")
        if held is None:  # one picture, or no video
            return np.zeros(array.sizes[dim], dtype=int)
        if held.dims != (dim,):
            raise AnalysisError(
                f"{dim}_{name} differs along {', '.join(map(str, held.dims))}; choose one of these first"
            )
        return held.values

    row, column, frame = (numbers(name) for name in ("row", "column", "frame"))
    mine = np.flatnonzero((row >= 0) & (numbers("image") == image))
    if not len(mine):
        raise AnalysisError(
            f"batch row {batch} has no picture {image} among its tokens; pictures count from 0"
        )
    place = np.stack([frame[mine], row[mine], column[mine]], 1)
    shape = tuple(place.max(0) + 1)
    mine = mine[np.lexsort(place.T[::-1])]
    if len(mine) != np.prod(shape):
        raise AnalysisError(
            f"{len(mine)} tokens do not fill the grid of picture {image}, {shape[1]} × {shape[2]}; keep all its tokens"
        )
    axes = [("frame", shape[0]), ("row", shape[1]), ("column", shape[2])][int(shape[0] == 1) :]
    held = {
        name: each
        for name, each in array.coords.items()
        if dim not in each.dims and (each.dims or name != "batch")
    }
    others = tuple(str(each) for each in array.dims if each != dim)
    values = array.transpose(*others, dim).values[..., mine]
    values = values.reshape(*values.shape[:-1], *(size for _, size in axes))
    coords = {**held, **{name: np.arange(size) for name, size in axes}}
    return xr.DataArray(values, coords, (*others, *(name for name, _ in axes)), array.name, array.attrs)
