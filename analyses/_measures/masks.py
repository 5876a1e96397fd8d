"""Scores of maps against known masks: pixel accuracy, mean intersection over union, and average precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.lens.errors import AnalysisError
from headwater.lens.media.pictures import pictures as read

SCORES = ("pixel_accuracy", "miou", "average_precision")


def masks_of(given: Any, count: int) -> Tensor:
    """Masks bool [picture, height, width] from an array, or from files of pictures or a folder of them, where what is
    brighter than half is inside."""
    if given is None:
        raise AnalysisError(
            "masks is not given; give bool [picture, height, width], or files of black and white pictures"
        )
    if isinstance(given, str | Path):
        folder = Path(given)
        if not folder.exists():
            raise AnalysisError(f"masks={str(given)!r}: there is no such file or folder")
        given = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    if isinstance(given, Sequence) and all(isinstance(each, str | Path) for each in given):
        shots = read((str(each), each) for each in given)
        arrays = [np.asarray(shot.convert("L")) > 127 for shot in shots]
        if len({array.shape for array in arrays}) > 1:
            raise AnalysisError("the masks are of unequal sizes; give masks of one size")
        given = np.stack(arrays)
    found = torch.as_tensor(np.asarray(given)) if not isinstance(given, Tensor) else given.cpu()
    if (
        found.dim() != 3
        or len(found) != count
        or (found.dtype != torch.bool and not bool(((found == 0) | (found == 1)).all()))
    ):
        raise AnalysisError(
            f"masks must be bool [picture, height, width] for {count} pictures; got {found.dtype} {list(found.shape)}"
        )
    found = found.bool()
    inside = found.flatten(1)
    if bool((inside.all(1) | ~inside.any(1)).any()):
        raise AnalysisError(
            "a mask is all inside or all outside, which no map can be scored by; leave its picture out"
        )
    return found


def over_picture(heat: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [picture, row, column] bilinearly over the pixels, cut off below 0 and stretched to 0 … 1, as released."""
    wide = torch.nn.functional.interpolate(heat[:, None], size=size, mode="bilinear", align_corners=False)[
        :, 0
    ]
    wide = wide.clamp_min(0)
    low, high = wide.amin((1, 2), keepdim=True), wide.amax((1, 2), keepdim=True)
    return (wide - low) / (high - low).clamp_min(1e-300)


def scores_of(maps: Tensor, masks: Tensor) -> dict[str, np.ndarray]:
    """The scores of every picture, each [picture]; a map is cut at its mean, as released."""
    cut = maps > maps.mean((1, 2), keepdim=True)
    both, either = (cut & masks).sum((1, 2)), (cut | masks).sum((1, 2))
    neither, some = (~cut & ~masks).sum((1, 2)), (~cut | ~masks).sum((1, 2))
    union = (both / either.clamp_min(1) + neither / some.clamp_min(1)) / 2
    accuracy = (cut == masks).double().mean((1, 2))
    precision = [
        average_precision(m.flatten(), inside.flatten()) for m, inside in zip(maps, masks, strict=True)
    ]
    return dict(zip(SCORES, (accuracy.numpy(), union.numpy(), np.array(precision)), strict=True))


def average_precision(values: Tensor, inside: Tensor) -> float:
    """`Σ_n (R_n - R_{n-1}) P_n` over the values as thresholds, equal values together."""
    order = values.argsort(descending=True)
    ranked, hits = values[order], inside[order].double().cumsum(0)
    ends = torch.cat(
        [ranked[1:] != ranked[:-1], torch.tensor([True])]
    )  # the last of each run of equal values
    hits, seen = hits[ends], torch.arange(1, len(values) + 1)[ends]
    recall = hits / hits[-1]
    return float(((recall - torch.cat([recall.new_zeros(1), recall[:-1]])) * hits / seen).sum())
