"""Uniform attention over the visible keys, the map that an attention map is compared with."""

from __future__ import annotations

import torch

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.rule import ScoreRule


def even_map(map: AttentionMap) -> AttentionMap:
    """Uniform weights over the visible keys of each row of `map`, as an operator in linear memory.

    Rows without visible keys and rows of padding are zero.
    """
    batch, heads, queries, keys = map.shape
    q, k = (torch.zeros(batch, heads, n, 1, device=map.q.device) for n in (queries, keys))
    counts = map.rule.mask.visible_keys(batch, heads).expand(batch, heads, queries).to(map.q.device)
    return AttentionMap.of(q, k, ScoreRule(1.0, map.rule.mask), counts.float().log())
