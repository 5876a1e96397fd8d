"""`Estimate`: the bytes that a record will take, computed from shapes alone, and the check that there is room."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from headwater.kernels.edits.weights import MixIdentity
from headwater.kernels.maps.statistics import COLUMN
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context
from headwater.lens.errors import EditError, ResourceError
from headwater.lens.models.opened import Opened
from headwater.lens.records.free_memory import NO_LIMIT, free_memory
from headwater.lens.records.recorder import Recorder

ENTRY = 210  # bytes of the file header for one tensor: name, dtype, shape, offsets and digest
LAYER = 900  # bytes of the file header for the score rule and mask of one layer

SURE = 2**20  # bytes that are there where a model runs


@dataclass(frozen=True)
class Estimate:
    """All fields are bytes: `bytes` of the record in memory, `parts` what they are for, `file` its size on disk,
    `available` free memory, `dense` what dense maps would take, `step` the most memory at once if it goes to a file.
    """

    bytes: int
    parts: dict[str, int]
    available: int
    dense: int
    file: int = 0
    step: int = 0

    @classmethod
    def together(cls, costs: Sequence[Estimate]) -> Estimate:
        """The sum for several records of one run."""
        names = dict.fromkeys(name for cost in costs for name in cost.parts)
        summed = {name: sum(cost.parts.get(name, 0) for cost in costs) for name in names}
        return cls(
            sum(c.bytes for c in costs), summed, min(c.available for c in costs), sum(c.dense for c in costs),
            sum(c.file for c in costs), max(c.step for c in costs),
        )  # fmt: skip

    def check(self) -> None:
        """ResourceError if the record would take more than half of the free memory."""
        if self.bytes > self.available // 2:
            raise ResourceError(
                f"the record would keep {_size(self.bytes)} and {_size(self.available)} are free; use keep=() for "
                f"statistics alone ({_size(self.parts['statistics'])}), fewer layers, a smaller batch, or "
                "keep_on='disk'"
            )

    def check_disk(self, folder: Path) -> None:
        """ResourceError if the file does not fit on the disk, or one layer takes more than half of the free memory."""
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


def total(recorders: Iterable[Recorder], whole: bool = True) -> Estimate:
    """The estimate for all recorders of one run; without `whole` as `estimate` says."""
    return Estimate.together([estimate(recorder, whole=whole) for recorder in recorders])


def estimate(recorder: Recorder, length: int | None = None, whole: bool = True) -> Estimate:
    """The estimate for one recorder and its tokens, or for rows of `length` tokens.

    Without `whole` it says what a record in memory needs before it is made: nothing of its file, and of one below
    `SURE` bytes nothing of the free memory, as asking the system takes longer than some layers of a short text.
    """
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
    shapes = [model.shape(layer) for layer in recorder.layers]
    values = batch * item * sum(shape.kv * shape.d_value for shape in shapes)
    per_stream = batch * positions * model.d_model * item
    kept = (
        batch * item * sum(s.d_head * (positions * s.heads + keys * s.kv) for s in shapes)
        + rows * row_constant
    )
    shared, each = _rules(model, recorder, (batch, positions, keys)) if recorder.keeps_maps else (0, 0)
    tokens = recorder.tokens.ids.numel() * 9 + batch * keys * len(recorder.groups)
    parts = {
        "statistics": sum(
            (columns if name in COLUMN else rows) * width.get(name, 4) for name in recorder.statistics
        ),
        "queries and keys": kept * recorder.keeps_maps,
        "score rules and edits": shared + each,
        "values": values * keys * ("qkv" in recorder.keep),
        "residual stream": (layers + 1) * per_stream * recorder.keeps_residuals,
        # about the values, queries, keys and outputs of a layer; its own widths are known only when it has run
        "mixers": 10 * 4 * batch * positions * model.d_model * len(model.mixers) * recorder.keeps_mixers,
        "tokens": tokens,
    }
    total = sum(parts.values())
    file = 0
    if whole:
        named = [*map(model.to_strings, recorder.tokens.ids.tolist())] if model.vocab else []
        file = total + len(json.dumps(named)) + header_size({"": recorder})
    available = free_memory() if whole or total > SURE else NO_LIMIT
    return Estimate(total, parts, available, 4 * rows * keys, file, (total - shared) // layers + shared)


def header_size(recorders: Mapping[str, Recorder]) -> int:
    """Approximate bytes of the file header: one entry per tensor, one block per layer, and the edits as JSON."""
    size = 1500
    for recorder in recorders.values():
        edits = len(context.active(recorder.model))
        tensors = len(recorder.statistics) + 3 * recorder.keeps_maps + len(set(recorder.keep) - {"qk"})
        size += len(recorder.layers) * (
            ENTRY * (tensors + 4 * edits) + LAYER * (1 + edits) * recorder.keeps_maps
        )
        size += ENTRY * (6 + len(recorder.groups))
        size += (9 * ENTRY + LAYER) * len(recorder.source.mixers) * recorder.keeps_mixers
        size += sum(
            len(json.dumps(edit.to_dict(), default=str)) for edit in context.user_edits(recorder.model)
        )
    return size


def _rules(model: Opened, recorder: Recorder, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes of masks, biases and edits in the maps: (shared by all layers, summed over layers)."""
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
            except EditError:  # needs the tokens of the run, or is wrong; the run itself raises in that case
                continue
            # an adapter may keep one number for every pair of query and key
            each += 8 * len(lowered.adapters) * batch * model.n_heads * queries * keys
            for edit in lowered.weights:
                factors = 1 if isinstance(edit, MixIdentity) else 2
                each += factors * 4 * batch * model.n_heads * queries
            each += sum(_bytes(edit) for edit in (*lowered.scores, *lowered.weights))
    return shared, each


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
