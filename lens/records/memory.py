"""Bytes that a record will take, from shapes alone, and the refusal where there is not that much room."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from headwater.kernels.edits.weights import MixIdentity
from headwater.kernels.maps.statistics import COLUMN
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context
from headwater.lens.errors import EditError, ResourceError
from headwater.lens.models.opened import Opened
from headwater.lens.records.recorder import Recorder

ENTRY = 210  # bytes of a file's header for one tensor: its name, type, shape, place and digest
LAYER = 900  # … and for what else it says of one layer


@dataclass(frozen=True)
class Estimate:
    """`bytes` that a record keeps, by part in `parts`; `file`, what it takes on disk; `available` memory.

    `dense` is what the maps would take, `step` the most that is alive at once where the record goes to a file.
    """

    bytes: int
    parts: dict[str, int]
    available: int
    dense: int
    file: int = 0
    step: int = 0

    @classmethod
    def together(cls, costs: Sequence[Estimate]) -> Estimate:
        """Several records of one run."""
        names = dict.fromkeys(name for cost in costs for name in cost.parts)
        summed = {name: sum(cost.parts.get(name, 0) for cost in costs) for name in names}
        return cls(
            sum(c.bytes for c in costs), summed, min(c.available for c in costs), sum(c.dense for c in costs),
            sum(c.file for c in costs), max(c.step for c in costs),
        )  # fmt: skip

    def check(self) -> None:
        """Raise ResourceError where the record would take more than half of what is free."""
        if self.bytes > self.available // 2:
            raise ResourceError(
                f"the record would keep {_size(self.bytes)} and {_size(self.available)} are free; use keep=() for "
                f"statistics alone ({_size(self.parts['statistics'])}), fewer layers, a smaller batch, or "
                "keep_on='disk'"
            )

    def check_disk(self, folder: Path) -> None:
        """Raise ResourceError where the file would not fit on the disk, or one layer not in memory."""
        free = shutil.disk_usage(folder).free if folder.is_dir() else self.file
        if self.file > free:
            raise ResourceError(
                f"the record would take {_size(self.file)} and {folder} has {_size(free)}; use keep=() for statistics "
                f"alone ({_size(self.parts['statistics'])}), fewer layers, or another disk"
            )
        if self.step > self.available // 2:
            raise ResourceError(
                f"one layer of the record takes {_size(self.step)} and {_size(self.available)} are free; use a "
                "smaller batch or a shorter prompt"
            )

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(n)}" for name, n in self.parts.items() if n)
        return f"{_size(self.bytes)} ({parts}); the dense maps would take {_size(self.dense)}"


def total(recorders: Iterable[Recorder]) -> Estimate:
    """What all recorders of one run will keep."""
    return Estimate.together([estimate(recorder) for recorder in recorders])


def estimate(recorder: Recorder, length: int | None = None) -> Estimate:
    """What `recorder` will keep of its tokens, or of a text of `length` tokens in each row."""
    model = recorder.source
    batch, positions = recorder.tokens.ids.shape
    keys = recorder.keys.ids.shape[1]
    if length is not None:
        positions = keys = length
    layers, heads = len(recorder.layers), model.n_heads
    rows = layers * batch * heads * positions
    columns = layers * batch * heads * keys
    width = {"argmax": 8, "visible": 8, "mass": 4 * len(recorder.groups)}
    item = model.dtype.itemsize
    row_constant = 8 if item == 8 else 4
    per_token = batch * model.d_head * item * layers
    kept = per_token * (positions * heads + keys * model.n_kv_heads) + rows * row_constant
    shared, each = _rules(model, recorder, (batch, positions, keys)) if recorder.keeps_maps else (0, 0)
    tokens = recorder.tokens.ids.numel() * 9 + batch * keys * len(recorder.groups)
    parts = {
        "statistics": sum(
            (columns if name in COLUMN else rows) * width.get(name, 4) for name in recorder.statistics
        ),
        "queries and keys": kept if recorder.keeps_maps else 0,
        "score rules and edits": shared + each,
        "values": per_token // model.d_head * _value_width(model) * keys * model.n_kv_heads
        if "qkv" in recorder.keep
        else 0,
        "residual stream": (layers + 1) * batch * positions * model.d_model * item
        if recorder.keeps_residuals
        else 0,
        "tokens": tokens,
    }
    total = sum(parts.values())
    strings = (
        json.dumps([model.to_strings(row.tolist()) for row in recorder.tokens.ids]) if model.vocab else ""
    )
    file = total + len(strings) + header_size({"": recorder})
    available = int(psutil.virtual_memory().available)
    return Estimate(total, parts, available, 4 * rows * keys, file, (total - shared) // layers + shared)


def header_size(recorders: Mapping[str, Recorder]) -> int:
    """About the bytes of a file's header: a line for each tensor, and what the edits say of themselves."""
    size = 1500
    for recorder in recorders.values():
        edits = len(context.active(recorder.model))
        tensors = len(recorder.statistics) + 3 * recorder.keeps_maps + len(set(recorder.keep) - {"qk"})
        size += len(recorder.layers) * (
            ENTRY * (tensors + 4 * edits) + LAYER * (1 + edits) * recorder.keeps_maps
        )
        size += ENTRY * (4 + len(recorder.groups))
        size += sum(
            len(json.dumps(edit.to_dict(), default=str)) for edit in context.user_edits(recorder.model)
        )
    return size


def _rules(model: Opened, recorder: Recorder, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes of what defines the maps beside queries and keys: (shared by all layers, of every layer together)."""
    batch, queries, keys = shape
    mask = Mask(queries, keys, right=0 if model.causal else None)
    shared = 0 if bool(recorder.tokens.mask.all()) else batch * (queries + keys + 16)
    modules = [m for layer in recorder.layers for m in model.attention_module(layer).modules()]
    each = 0
    if any(getattr(module, "relative_attention_bias", None) is not None for module in modules):
        shared += model.n_heads * queries * keys * model.dtype.itemsize
    if model.read_only:
        each += 4 * batch * model.n_heads * queries * keys * len(recorder.layers)
    for prepared in context.active(model.key):
        for layer in recorder.layers:
            try:
                lowered = prepared.lower(layer, mask, batch)
            except EditError:  # it names what only the run knows, or can not be: the run says which
                continue
            # edits of a layer's own queries and keys may keep a number for every pair
            each += 8 * len(lowered.adapters) * batch * model.n_heads * queries * keys
            for edit in lowered.weights:
                factors = 1 if isinstance(edit, MixIdentity) else 2
                each += factors * 4 * batch * model.n_heads * queries
            each += sum(_bytes(edit) for edit in (*lowered.scores, *lowered.weights))
    return shared, each


def _value_width(model: Opened) -> int:
    """Numbers of a head's value; DeepSeek's are narrower than its queries."""
    return int(getattr(model.attention_module(model.layers[0]), "v_head_dim", model.d_head))


def _bytes(item: Any) -> int:
    if isinstance(item, Tensor):
        return item.numel() * item.element_size()
    if dataclasses.is_dataclass(item):
        return sum(_bytes(getattr(item, field.name)) for field in dataclasses.fields(item))
    return sum(map(_bytes, item)) if isinstance(item, tuple) else 0


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
