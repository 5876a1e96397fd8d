"""Bytes that a record will take, from shapes alone, and the refusal where there is not that much memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from headwater.lens.errors import ResourceError

if TYPE_CHECKING:
    from headwater.lens.model import HookedModel
    from headwater.lens.record import Recorder


@dataclass(frozen=True)
class Estimate:
    """`bytes` that a record keeps, by part in `parts`; `available` memory; `dense`, what the maps would take."""

    bytes: int
    parts: dict[str, int]
    available: int
    dense: int

    def check(self) -> None:
        """Raise ResourceError where the record would take more than half of what is free."""
        if self.bytes > self.available // 2:
            raise ResourceError(
                f"the record would keep {_size(self.bytes)} and {_size(self.available)} are free; use keep=() for "
                f"statistics alone ({_size(self.parts['statistics'])}), fewer layers, or a smaller batch"
            )

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(n)}" for name, n in self.parts.items() if n)
        return f"{_size(self.bytes)} ({parts}); the dense maps would take {_size(self.dense)}"


def estimate(model: HookedModel, shape: tuple[int, ...], recorder: Recorder) -> Estimate:
    """What `recorder` would keep for tokens of `shape` [batch, position]."""
    batch, positions = shape
    layers, heads = len(recorder.layers), model.n_heads
    rows = layers * batch * heads * positions
    width = {"argmax": 8, "visible": 8, "mass": 4 * len(recorder.groups)}
    item = model.dtype.itemsize
    per_token = batch * positions * model.d_head * item * layers
    parts = {
        "statistics": sum(rows * width.get(name, 4) for name in recorder.statistics),
        "queries and keys": per_token * (heads + model.n_kv_heads) + rows * 4 if recorder.keep else 0,
        "values": per_token * model.n_kv_heads if "qkv" in recorder.keep else 0,
    }
    available = int(psutil.virtual_memory().available)
    return Estimate(sum(parts.values()), parts, available, 4 * rows * positions)


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
