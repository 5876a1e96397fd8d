"""Plain attention over all keys but a few, through torch's fused kernel and without a mask of keys, which slows it.

The columns are taken out. Under a causal mask their rows go with them, so that what is left is causal again: row i and
column i stand at the same place. The few rows that went are a call of their own, under a small mask of pairs.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from headwater.kernels.backends import fused_kernel
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.kernels.tiles.shapes import Keys, Output, PerQuery, Queries, Values

LEAST = 64  # queries: for fewer a mask of keys costs less than keys and values without the few


def takes(rule: ScoreRule) -> bool:
    """Whether the mask is causal and square, or shows everything, and nothing is added to the scores."""
    mask = rule.mask
    square = mask.right is not None and mask.shift + mask.right == 0 and mask.queries == mask.keys
    shown = mask.is_band and mask.valid_keys is None and mask.left is None and (mask.right is None or square)
    return shown and rule.bias is None and not rule.edits and mask.queries >= LEAST


def attend(q: Queries, k: Keys, v: Values, rule: ScoreRule, few: Tensor) -> tuple[Output, PerQuery]:
    """z and lse without a learned sink over the keys that are not among the `few`, bool [key]; -inf where a row sees
    no other."""
    rule = replace(rule, sinks=None)
    z, lse = q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], -torch.inf)
    rows, kept = few.nonzero()[:, 0], (~few).nonzero()[:, 0]
    if not len(kept):
        return z, lse
    first = int(kept[0])
    if first == len(rows):  # the first keys of all: what is left lies side by side
        k, v = k[:, :, first:], v[:, :, first:]
    else:
        k, v = k.index_select(2, kept), v.index_select(2, kept)
    if rule.mask.right is None:
        return fused_kernel.attend(q, k, v, replace(rule, mask=Mask(rule.mask.queries, len(kept))))
    square = replace(rule, mask=Mask(len(kept), len(kept), right=0))
    if first == len(rows):
        z[:, :, first:], lse[:, :, first:] = fused_kernel.attend(q[:, :, first:], k, v, square)
        return z, lse
    z[:, :, kept], lse[:, :, kept] = fused_kernel.attend(q.index_select(2, kept), k, v, square)
    seen = torch.where(kept < rows[:, None], 0.0, -torch.inf).to(q)[None, None]
    of_rows = replace(rule, mask=Mask(len(rows), len(kept)), bias=seen)
    z[:, :, rows], lse[:, :, rows] = fused_kernel.attend(q[:, :, rows], k, v, of_rows)
    return z, lse
