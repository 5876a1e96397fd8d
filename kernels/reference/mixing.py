"""Mixing of heads and of neighbouring pairs, dense: the meaning of kernels/edits/mixing.py."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from headwater.kernels.edits.mixing import ConvolveScores, MixHeads
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.shapes import Weights


def heads_mixed(x: Weights, edit: MixHeads) -> Weights:
    """sum over h of M_gh,ij x_h,ij with the whole M; hidden scores count as 0 and stay hidden."""
    batch, heads, queries, keys = x.shape
    whole = torch.zeros(batch, queries, keys, heads, heads, dtype=x.dtype)
    whole = whole + edit.mix.to(x)[:, None, None]
    if edit.of_query is not None:
        whole = whole + edit.of_query.to(x)[:, :, None]
    if edit.of_key is not None:
        whole = whole + edit.of_key.to(x)[:, None]
    found = torch.einsum("bijgh,bhij->bgij", whole, torch.where(x > -torch.inf, x, 0.0))
    return torch.where(x > -torch.inf, found, -torch.inf)


def convolved(
    scores: Weights, edit: ConvolveScores, rule: ScoreRule, seen: Bool[Tensor, "batch head query key"]
) -> Weights:
    """Every pair as the sum over its neighbours, one neighbour at a time."""
    counts = seen & (scores > -torch.inf)
    if rule.mask.valid_queries is not None:
        counts = counts & rule.mask.valid_queries[:, None, :, None]
    shown, found = torch.where(counts, scores, 0.0), torch.zeros_like(scores)
    queries, keys = scores.shape[2:]
    for a in range(edit.kernel.shape[2]):
        for b in range(edit.kernel.shape[3]):
            for i in range(a, queries):
                for j in range(max(b - edit.ahead, 0), min(keys + b - edit.ahead, keys)):
                    tap = edit.kernel[:, :, a, b].to(scores)
                    found[:, :, i, j] = found[:, :, i, j] + tap * shown[:, :, i - a, j + edit.ahead - b]
    return torch.where(scores > -torch.inf, found, -torch.inf)
