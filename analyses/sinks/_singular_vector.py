"""The leading right singular vector of attention maps, by power iteration on AᵀA from equal entries.

A step takes two products with the map, in linear memory. If the two largest singular values are close, the iteration
may stop at a mixture of their vectors; the caller learns which heads have not converged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.kernels.maps.attention_map import AttentionMap

STEPS = 100
STILL = 1e-4  # converged if no share moves by more in a step


def leading_shares(map: AttentionMap) -> tuple[Tensor, Tensor]:
    """`v_j²` of the leading vector v, [batch, head, key] in float32, and which heads converged, bool [batch, head].

    The shares of a head sum to 1; they are NaN if the map has no weights.
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
