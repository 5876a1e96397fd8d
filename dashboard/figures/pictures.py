"""Numbers of image patches as a grid, or as a veil over the picture that the model saw."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from headwater.dashboard.figures.labels import escaped, visible
from headwater.dashboard.figures.names import grid_of, tokens_of
from headwater.dashboard.figures.panels import Panel, lines
from headwater.dashboard.figures.style import VEIL, heat
from headwater.dashboard.figures.values import Shown
from headwater.lens.errors import AnalysisError

PALETTES = ("1", "P", "PA", "LA", "La", "CMYK", "YCbCr", "LAB", "HSV")  # modes of PIL
MOST_APART = 64  # bars of tokens that are no patches
OPACITY = 0.6  # of signed numbers; others let the picture through where they are small


def pixels(image: Any) -> np.ndarray:
    """A picture as [height, width, 3] in 0 to 255, from a PIL image, an array or a tensor, grey or in colours.

    Channels may stand first, as in `pixel_values`. Floats in 0 to 1, whole numbers in 0 to 255 and flags (black and
    white) are taken as they are; others, such as normalised pixels, are stretched from their smallest to their largest
    number. AnalysisError for anything else, and for video.
    """
    if hasattr(image, "detach"):  # NumPy has no bfloat16
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    elif getattr(image, "mode", "") in PALETTES:  # numbers of a palette, ink or transparency are no colours
        image = image.convert("RGB")
    array = np.asarray(image)
    if array.dtype.kind not in "fiub" or array.ndim < 2:
        raise AnalysisError(
            f"image= takes a picture as array, tensor or PIL image; got {type(image).__name__}"
        )
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim > 3:
        raise AnalysisError(f"image= takes one picture, not several or a video; got the shape {array.shape}")
    if array.ndim == 2:
        array = array[:, :, None]
    first, last = array.shape[0], array.shape[-1]
    if (first in (1, 3) and last not in (1, 3)) or (first == 4 and last not in (1, 3, 4)):
        array = np.moveaxis(array, 0, -1)
    if array.shape[-1] not in (1, 3, 4) or not array.size:
        raise AnalysisError(f"image= has 1, 3 or 4 channels, first or last; got the shape {array.shape}")
    array = array[:, :, :3] if array.shape[-1] > 1 else np.repeat(array, 3, axis=2)
    most = 1 if array.dtype.kind in "fb" else 255
    array = array.astype(np.float64) / most
    known = array[np.isfinite(array)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if low < 0 or high > 1:
        array = (array - low) / max(high - low, 1e-12)
    return np.round(np.clip(np.nan_to_num(array), 0, 1) * 255).astype(np.uint8)


def of_patches(array: xr.DataArray, dim: str) -> np.ndarray:
    """The numbers of the patches along an axis, without the tokens that are none."""
    found = grid_of(array.isel(batch=0) if "batch" in array.dims else array, dim)
    return array.values if found is None else array.isel({dim: found[2]}).values


def apart(part: xr.DataArray, of: Shown) -> Panel | None:
    """Bars of the tokens that are no patches: class token, registers, words. None where all are patches."""
    if part.ndim != 1:
        return None
    (dim,) = map(str, part.dims)
    found = grid_of(part, dim)
    others = [] if found is None else sorted(set(range(part.size)) - set(found[2]))
    if not others or not np.isfinite(part.values[others]).any():
        return None
    panel = lines(part.isel({dim: others[:MOST_APART]}), of, None, curves=False)
    panel.title = "other tokens"
    if len(others) > MOST_APART:
        panel.title += f": the first {MOST_APART} of {len(others)}"
    panel.shares_y, panel.own_axes = False, True
    return panel


def patches(part: xr.DataArray, of: Shown, picture: np.ndarray | None) -> Panel:
    """One number per patch where the patch stands, of an array per token or per row and column.

    Tokens that are no patches are named in the remark.
    """
    if part.ndim == 2:
        (rows, columns), grid, aside = part.shape, part.values, []
    else:
        (dim,) = map(str, part.dims)
        tokens = tokens_of(part, dim) or []
        found = grid_of(part, dim)
        if found is None:
            raise AnalysisError(
                f"{part.name or 'the result'} is not per patch of an image: its {dim} has no names such as 3,5"
            )
        rows, columns, places = found
        grid = part.values[places].reshape(rows, columns)
        aside = [
            f"{escaped(visible(token))} {value:.3g}"
            for i, (token, value) in enumerate(zip(tokens, part.values, strict=True))
            if i not in set(places)
        ]
    remark = f"grid of {rows} × {columns} patches"
    high, wide = (rows, columns) if picture is None else picture.shape[:2]
    tall, broad = high / rows, wide / columns  # of a patch, in pixels
    if picture is not None and abs(tall - broad) / max(tall, broad) > 0.5 / max(rows, columns):
        raise AnalysisError(
            f"the picture is {high} × {wide} pixels and the grid {rows} × {columns} patches; give the picture as the "
            "model saw it, resized and cut in the same way"
        )
    across, down = ((np.arange(n) + 0.5) * size / n - 0.5 for n, size in ((columns, wide), (rows, high)))
    hover = np.array([[f"{row},{column}" for column in range(columns)] for row in range(rows)])
    over = picture is not None and of.limits[0] >= 0
    veil = heat(
        grid, of.limits, VEIL if over else of.colours, of.short_unit, x=across, y=down, text=hover,
        hovertemplate=f"patch %{{text}} (row, column)<br>%{{z:.4g}} {of.short_unit}<extra></extra>",
        opacity=1.0 if picture is None or over else OPACITY,
    )  # fmt: skip
    traces = [veil] if picture is None else [go.Image(z=picture, hoverinfo="skip"), veil]
    word = "patch" if picture is None else "pixel"
    height = int(np.clip(420 * high / wide, 160, 520))
    square: dict[str, Any] = {"showgrid": False, "zeroline": False, "constrain": "domain"}
    x = {**square, "title": {"text": f"column, {word}"}, "range": [-0.5, wide - 0.5]}
    y = {**square, "title": {"text": f"row, {word}"}, "range": [high - 0.5, -0.5], "scaleanchor": "x"}
    others = f"no patch: {', '.join(aside[:5])}{' …' if len(aside) > 5 else ''}" if aside else ""
    return Panel(traces, x, y, height, remark=remark, aside=others)
