"""Statistics of plain softmax maps by compiled loops, where the extra `fast` is installed: `kernels/compiled/`.

What the loops do not take goes through kernels/maps/softmax_statistics.py, whose numbers are the same to rounding.
Small maps go there too, as the loops are compiled when they are first used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headwater.kernels.compiled import walks
from headwater.kernels.rules.map_state import MapState


def takes(map: MapState) -> bool:
    """Whether a plain softmax map, which `softmax_statistics` takes, is computed here."""
    device_fits = map.q.device.type == "cpu" and map.dtype == torch.float32
    if not device_fits or not map.mask.is_band or math.prod(map.shape) < walks.LEAST or walks.loops() is None:
        return False
    return walks.ends(map.mask) is not None and not bool(map.lse.isnan().any())


def stream(map: MapState, names: list[str], found: dict[str, Tensor], window: int) -> None:
    """Fill `found[name]`, which come as zeros; rows without weights are left to the caller.

    `window` is where `windowed_distance` clips (tokens).
    """
    walks.walk(map.q, map.k, None, map.rule, names, found, window, map.lse)
