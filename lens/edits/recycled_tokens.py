"""Removed tokens merged into a few that stay: VFlowOpt's recycled tokens (Yang et al. 2025, from memory).

Each removed token goes to the anchor with the most similar state, by cosine. An anchor becomes the mean of itself and
of the tokens that went to it, weighted by the similarity (negative ones count as 0, its own as 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def recycled(x: Tensor, anchors: Tensor, removed: Tensor) -> Tensor:
    """States [batch, position, d_model] with the anchors changed; `anchors`, `removed` are bool [batch, position]."""
    x = x.clone()
    for row, (of, gone) in enumerate(zip(anchors, removed, strict=True)):
        places, others = of.nonzero()[:, 0].to(x.device), gone.nonzero()[:, 0].to(x.device)
        if not len(places) or not len(others):
            continue
        unit = torch.nn.functional.normalize(x[row].float(), dim=-1)
        likeness = (unit[others] @ unit[places].mT).clamp_min(0)
        most, nearest = likeness.max(-1)
        weights = torch.zeros_like(likeness).scatter(1, nearest[:, None], most[:, None])
        total = x[row, places].float() + weights.mT @ x[row, others].float()
        x[row, places] = (total / (1 + weights.sum(0))[:, None]).to(x.dtype)
    return x
