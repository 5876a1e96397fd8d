"""The compiled walk over a layer's maps, in parts that threads take: rows of the heads that share some keys.

It takes float32 tensors and those of 16 bits on the CPU behind a band with padding at the ends, which is what nearly
every model has. Bits do not depend on the number of threads. Memory: float32 copies of the keys and values of a few
heads, and for each thread the weights of 32 rows.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.threads import mapped
from headwater.kernels.tiles.mask import Mask

LEAST = 2**21  # pairs of a layer's maps, below which the loops, which have to be compiled first, gain nothing
PART = 2**22  # pairs of one thread's part at least
PARTS = 8, 256  # of a layer's maps, at least and at most


class Part(NamedTuple):
    """What one thread computes: rows of the heads that some heads of keys serve, in one batch row."""

    batch: int
    key_heads: slice
    rows: slice


@functools.cache
def loops() -> Any:
    """The compiled loops; None where numba is not installed, is switched off or does not fit this Python or numpy."""
    try:
        return importlib.import_module("headwater.kernels.compiled.loops")
    except ImportError:
        return None


def computed_by() -> str:
    """What computes long plain maps and their statistics on the CPU, on which their last digits depend."""
    return (
        "torch"
        if loops() is None
        else importlib.import_module("headwater.kernels.compiled.arithmetic").COMPILER
    )


def walk(
    q: Tensor, k: Tensor, v: Tensor | None, rule: ScoreRule, names: Sequence[str], found: dict[str, Tensor],
    window: int, lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill `found[name]`, which come as zeros, with the statistics; rows without weights are left to the caller.

    With v it gives z, float32 [batch, head, query, d_value], and the log-sum-exp, -inf on rows that see no key, both
    with the learned sinks of the rule. `lse` is the log-sum-exp where it is known, as in a `MapState`, the sinks in it.
    `window` is where `windowed_distance` clips (tokens).
    """
    compiled, mask = loops(), rule.mask
    batch, heads, queries, _ = q.shape
    group, length = heads // k.shape[1], k.shape[2]
    run = compiled.walk_of(compiled.Asked(**{name: name in names for name in compiled.Asked._fields}))
    seen = ends(mask)
    assert seen is not None
    low, high = (end.expand(batch, -1).contiguous() for end in seen)
    real = (
        torch.ones(1, queries, dtype=torch.bool) if mask.valid_queries is None else mask.valid_queries.cpu()
    )
    real, nothing = real.expand(batch, -1), torch.empty(0, 0)
    z = torch.zeros(batch, heads, queries, 0 if v is None else v.shape[-1])
    sinks = None if rule.sink_logits is None or lse is not None else rule.sink_logits.detach().float().cpu()
    sinks = None if sinks is None else sinks.expand(batch, heads, queries)
    of_rows = torch.full((batch, heads, queries), -torch.inf) if lse is None else torch.empty(batch, heads, 0)

    def of(given: tuple[Part, np.ndarray, np.ndarray]) -> Tensor:
        (b, key_heads, rows), keys, values = given
        h = slice(key_heads.start * group, key_heads.stop * group)
        each = {name: found[name][b, h] for name in names if name != "received"}
        received = torch.zeros(h.stop - h.start, length) if "received" in names else nothing
        known = nothing if lse is None else lse[b, h].detach().float()
        added = nothing if sinks is None else sinks[b, h]
        run(
            q[b, h].detach().float().numpy(), keys, values, length, group, known.numpy(), added.numpy(),
            real[b].numpy(),
            low[b].numpy(), high[b].numpy(), rows.start, rows.stop, mask.shift, rule.scale, window,
            tuple(each.get(name, nothing).numpy() for name in compiled.ROW), each.get("argmax", nothing.long()).numpy(),
            received.numpy(), z[b, h].numpy(), of_rows[b, h].numpy(),
        )  # fmt: skip
        return received

    every = parts((batch, heads, queries, length), k.shape[1], (high - low).clamp_min(0).sum(0))
    for part, received in zip(every, mapped(of, _with_keys(every, k, v), q.device), strict=True):
        if "received" in names:
            # One after another in a fixed order, so that the sum is the same bit for bit. By numpy, as torch would wake
            # its own threads for each sum, and they then hold the cores of those that walk for some milliseconds.
            h = slice(part.key_heads.start * group, part.key_heads.stop * group)
            found["received"].numpy()[part.batch, h] += received.numpy()
    return z, of_rows


def _with_keys(
    every: Sequence[Part], k: Tensor, v: Tensor | None
) -> Iterator[tuple[Part, np.ndarray, np.ndarray]]:
    """Each part with its keys in panels, [kv head, panel, d, key], and its values, [kv head, panel, key, feature]."""
    wide = importlib.import_module("headwater.kernels.compiled.arithmetic").WIDE
    # parts of the same heads of keys follow each other
    for (b, _), some in itertools.groupby(every, lambda part: (part.batch, part.key_heads.start)):
        some = list(some)
        heads, values = some[0].key_heads, np.empty(0, np.float32)
        length, d = k.shape[2:]
        padded = np.zeros((heads.stop - heads.start, length + -length % wide, d), np.float32)
        padded[:, :length] = k[b, heads].detach().float().numpy()
        keys = padded.reshape(len(padded), -1, wide, d).swapaxes(2, 3).ravel()
        if v is not None:
            d = v.shape[-1]
            padded = np.zeros((len(padded), length, d + -d % wide), np.float32)
            padded[:, :, :d] = v[b, heads].detach().float().numpy()
            values = padded.reshape(len(padded), length, -1, wide).swapaxes(1, 2).ravel()
        for part in some:
            yield part, keys, values


def parts(shape: tuple[int, int, int, int], key_heads: int, seen: Tensor) -> list[Part]:
    """All rows of all maps in parts; `seen` is how many keys each row sees, [query], in all batch rows together."""
    batch, heads, queries, _ = shape
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


def ends(mask: Mask) -> tuple[Tensor, Tensor] | None:
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
