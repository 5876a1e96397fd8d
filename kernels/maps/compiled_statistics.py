"""Statistics of plain softmax maps by compiled loops, where the extra `fast` is installed: `compiled_loops.py`.

It takes float32 tensors and those of 16 bits on the CPU behind a band with padding at the ends, which is what nearly
every model has; the rest goes through kernels/maps/softmax_statistics.py, whose numbers are the same to rounding. Small
maps go there too, as the loops are compiled when they are first used. A thread takes some rows of the heads that share
their keys. Memory: for each thread one copy of those keys.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwater.kernels.maps import softmax_statistics
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.threads import mapped
from headwater.kernels.tiles.mask import Mask

LEAST = 2**21  # pairs of a layer's maps
PART = 2**21  # pairs of one thread's part at least
PARTS = 8, 256  # of a layer's maps, at least and at most
LOG2E = softmax_statistics.LOG2E


class Part(NamedTuple):
    """What one thread computes: rows of the heads that some heads of keys serve, in one batch row."""

    batch: int
    key_heads: slice
    rows: slice


@functools.cache
def loops() -> Any:
    """The compiled loops; None where numba is not installed, is switched off or does not fit this Python or numpy."""
    try:
        return importlib.import_module("headwater.kernels.maps.compiled_loops")
    except ImportError:
        return None


def computed_by() -> str:
    """What computes statistics of long plain maps on the CPU, on which their last digits depend."""
    found = loops()
    return "torch" if found is None else found.COMPILER


def takes(map: MapState) -> bool:
    """Whether a plain softmax map, which `softmax_statistics` takes, is computed here."""
    device_fits = map.q.device.type == "cpu" and map.dtype == torch.float32
    if not device_fits or not map.mask.is_band or _pairs(map) < LEAST or loops() is None:
        return False
    return _ends(map.mask) is not None and not bool(map.lse.isnan().any())


def stream(map: MapState, names: list[str], found: dict[str, Tensor], window: int) -> None:
    """Fill `found[name]`, which come as zeros; rows without weights are left to the caller.

    `window` is where `windowed_distance` clips (tokens).
    """
    compiled, rule, mask = loops(), map.rule, map.mask
    asked = set(names) | ({"peak"} if {"max", "argmax"} & set(names) else set())
    walk = compiled.walk_of(compiled.Asked(**{name: name in asked for name in compiled.Asked._fields}))
    ends = _ends(mask)
    assert ends is not None
    low, high = (end.expand(len(map.q), -1).contiguous() for end in ends)
    group = map.q.shape[1] // map.k.shape[1]
    nothing = torch.empty(0, 0, 0)

    def of(part: Part) -> Tensor:
        b, rows = slice(part.batch, part.batch + 1), part.rows
        h = slice(part.key_heads.start * group, part.key_heads.stop * group)
        q, k = (x.detach().to(torch.float32) for x in (map.q[b, h], map.k[b, part.key_heads]))
        starts = map.lse[b, h].to(torch.float32) / rule.scale
        rows_of = {name: found[name][b, h] for name in names if name != "received"}
        received = torch.zeros(1, q.shape[1], k.shape[2]) if "received" in names else nothing
        walk(
            q.numpy(), k.numpy(), starts.numpy(), low[b].numpy(), high[b].numpy(), rows.start, rows.stop, mask.shift,
            rule.scale * LOG2E, window, tuple(rows_of.get(name, nothing).numpy() for name in compiled.ROW),
            rows_of.get("argmax", nothing.long()).numpy(), received.numpy(),
        )  # fmt: skip
        return received

    parts = _parts(map, (high - low).clamp_min(0).sum(0))
    for part, received in zip(parts, mapped(of, parts, map.q.device), strict=True):
        if "received" in names:
            # one after another in a fixed order, so that the sum is the same bit for bit
            heads = slice(part.key_heads.start * group, part.key_heads.stop * group)
            found["received"][part.batch : part.batch + 1, heads] += received


def _parts(map: MapState, seen: Tensor) -> list[Part]:
    """All rows of all maps in parts; `seen` is how many keys each row sees, [query], in all batch rows together."""
    batch, heads, queries, _ = map.shape
    key_heads = map.k.shape[1]
    each = int(seen.sum()) * heads // max(batch * key_heads, 1)  # pairs of one head of keys
    together = min(max(PART // max(each, 1), 1), key_heads)
    total = each * batch * key_heads
    # from the size alone, so that the sums do not depend on the number of threads
    count = min(max(total // PART, PARTS[0]), PARTS[1])
    runs = -(-count // (batch * -(-key_heads // together)))
    bounds = torch.linspace(0, float(seen.sum()), runs + 1)[1:-1]
    cuts = sorted({0, *torch.searchsorted(seen.cumsum(0).float(), bounds).tolist(), queries})
    return [
        Part(b, slice(h, min(h + together, key_heads)), slice(first, last))
        for b in range(batch)
        for h in range(0, key_heads, together)
        for first, last in itertools.pairwise(cuts)
    ]


def _pairs(map: MapState) -> int:
    batch, heads, queries, keys = map.shape
    return batch * heads * queries * keys


def _ends(mask: Mask) -> tuple[Tensor, Tensor] | None:
    """The first column that each row sees and one past the last, [batch|1, query]; None if keys between are hidden."""
    low, high = mask.lower()[None], mask.upper().clamp_min(0)[None]
    real = mask.valid_keys
    if real is None or not mask.keys:
        return low, high
    real = real.cpu()
    first = real.long().argmax(-1, keepdim=True)
    last = mask.keys - real.flip(-1).long().argmax(-1, keepdim=True)
    count = real.sum(-1, keepdim=True)
    if bool(((last - first != count) & (count > 0)).any()):
        return None
    return torch.where(count > 0, torch.maximum(low, first), 0), torch.where(
        count > 0, torch.minimum(high, last), 0
    )
