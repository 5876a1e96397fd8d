"""The leading direction of attention maps among the keys: the right singular vector of the largest singular value.

Two products with the map per step and linear memory: power iteration on AᵀA from equal entries. Where the two largest
singular values are close it is slow, and what it stops at is a mixture of their vectors; the caller is told.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.kernels.maps.attention_map import AttentionMap

STEPS = 100
STILL = 1e-4  # a share that moves less than this in a step has settled


def leading_shares(map: AttentionMap) -> tuple[Tensor, Tensor]:
    """`v_j²` with v the leading direction, [batch, head, key] in float32, and which heads have settled, [batch, head].

    The shares of a head sum to 1; they are NaN where the map has no weights.
    """
    batch, heads, _, keys = map.shape
    x = torch.full((batch, heads, keys, 1), keys**-0.5, device=map.q.device)
    settled = torch.zeros(batch, heads, dtype=torch.bool)
    for _ in range(STEPS):
        pulled = (map.T @ (map @ x).float()).float()
        new = pulled / pulled.norm(dim=2, keepdim=True)
        moved = (new.square() - x.square()).abs().amax((2, 3))
        x = new
        settled = ~(moved >= STILL).cpu()
        if settled.all():
            break
    return x[..., 0].square().cpu(), settled
