"""The map of a linear recurrence and of a convolution, dense and in float64, as the papers write them.

A recurrence keeps a state S_t, [d, c], and reads it with q_t: o_t = S_tᵀ q_t. Its values v enter the state along k_t,
multiplied by β_t; a_t in (0, 1] is its decay, one number for the state or one for each of its d rows. Then o = A v:

    linear attention, selective state space:  S_t = a_t ⊙ S_{t-1} + β_t k_t v_tᵀ
    delta rule:                                S_t = (I - β_t k_t k_tᵀ)(a_t ⊙ S_{t-1}) + β_t k_t v_tᵀ

Katharopoulos et al. 2020 (arXiv 2006.16236); Yang et al. 2024 (gated delta rule, arXiv 2412.06464); Gu & Dao 2023
(arXiv 2312.00752); Dao & Gu 2024 (masked matrix duality, arXiv 2405.21060); Ali et al. 2024 (hidden attention of Mamba,
arXiv 2403.01590).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def decayed_products(
    q: Float[Tensor, "*heads query d"],
    k: Float[Tensor, "*heads key d"],
    decay: Float[Tensor, "*heads query #d"],
) -> Float[Tensor, "*heads query key"]:
    """`Σ_n q_in k_jn Π_{j<m≤i} a_mn` for j ≤ i, else 0; `decay` holds a."""
    length = q.shape[-2]
    found = torch.zeros(*q.shape[:-1], length, dtype=torch.float64)
    for i in range(length):
        passed = torch.ones_like(decay[..., 0, :], dtype=torch.float64)
        for j in range(i, -1, -1):
            found[..., i, j] = (q[..., i, :].double() * passed * k[..., j, :].double()).sum(-1)
            passed = passed * decay[..., j, :].double()
    return found


def recurrence(
    q: Float[Tensor, "*heads query d"], k: Float[Tensor, "*heads key d"],
    decay: Float[Tensor, "*heads query #d"], write: Float[Tensor, "*heads key"], delta: bool,
) -> Float[Tensor, "*heads query key"]:  # fmt: skip
    """A = (QKᵀ ⊙ decay) diag(β), or with the delta rule (QKᵀ ⊙ decay)(I + tril(diag(β) KKᵀ ⊙ decay, -1))⁻¹ diag(β)."""
    reads = decayed_products(q, k, decay)
    if delta:
        corrections = (write.double()[..., None] * decayed_products(k, k, decay)).tril(-1)
        reads = reads @ torch.linalg.inv(torch.eye(q.shape[-2], dtype=torch.float64) + corrections)
    return reads * write.double()[..., None, :]


def convolution(taps: Float[Tensor, "channel tap"], length: int) -> Float[Tensor, "channel query key"]:
    """A_ij = w_{K-1-(i-j)} for 0 ≤ i - j < K: the causal convolution of each channel with its K taps."""
    found = torch.zeros(taps.shape[0], length, length, dtype=torch.float64)
    for back in range(min(taps.shape[1], length)):
        along = torch.arange(back, length)
        found[:, along, along - back] = taps[:, taps.shape[1] - 1 - back, None].double()
    return found
