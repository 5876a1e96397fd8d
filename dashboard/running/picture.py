"""The patches of a run on the grid of its picture, and the picture as the model saw it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr

import headwater as hw
from headwater.dashboard.running.models import resident
from headwater.dashboard.running.runs import Run


def grid(run: Run) -> tuple[int, int, int] | None:
    """Frames, rows and columns of the patches, whichever side they stand on; None without any."""
    for axis in (run.record.key_axis, run.record.query_axis):
        if axis.grids and axis.grids[0]:
            return axis.grids[0][0].shape
    return None


def pixels(run: Run) -> np.ndarray | None:
    """The picture as the model saw it, [channel, row, column]; None of a film or of several pictures."""
    if run.of_record:  # it holds the places of patches and no picture
        return None
    tokens = resident(run.name).to_tokens(run.example)
    found = getattr(tokens, "more", {}).get("pixel_values", tokens)
    found = torch.as_tensor(found).detach().float().cpu()
    found = found[0] if found.dim() == 4 and len(found) == 1 else found
    return found.numpy() if found.dim() == 3 and found.shape[0] in (1, 3) else None


def word(run: Run, position: int, layer: int, head: int) -> xr.DataArray:
    """The weight between one token and each patch."""
    return hw.analyses.word_on_picture(run.record, position=position, layers=[layer], heads=f"{layer}.{head}")


def region(run: Run, box: tuple[int, int, int, int], layer: int, head: int) -> xr.DataArray:
    """The weight per patch between a box (first row and column, last row and column) and each word."""
    found = hw.analyses.region_words(run.record, region=box, layers=[layer], heads=f"{layer}.{head}")
    along = next(dim for dim in ("query", "key") if dim in found.inside.dims)
    inside = found.inside.isel({along: np.isfinite(found.inside.values[0])})
    return inside.assign_attrs(found.attrs, unit="attention weight per patch")


def has_words(run: Run) -> bool:
    """Whether there are tokens beside the patches."""
    axis: Any = run.record.key_axis if any(run.record.key_axis.grids or ()) else run.record.query_axis
    patches = {n for each in axis.grids[0] for n in each.tokens().tolist()}
    return any(n not in patches for n in axis.valid[0].nonzero()[:, 0].tolist())
