"""Maps that are no softmax of one set of scores, dense and in float64, as the papers write them.

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
from jaxtyping import Float, Int
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


def agents(
    q: Float[Tensor, "*heads query d"], a: Float[Tensor, "*heads agent d"], k: Float[Tensor, "*heads key d"],
    scale: float,
) -> Float[Tensor, "*heads query key"]:  # fmt: skip
    """softmax(Q Aᵀ) softmax(A Kᵀ): agent attention (Han et al. 2023, arXiv 2312.08874)."""
    q, a, k = q.double(), a.double(), k.double()
    return (scale * q @ a.mT).softmax(-1) @ (scale * a @ k.mT).softmax(-1)


def listed(
    columns: Int[Tensor, "batch head query n"], weights: Float[Tensor, "batch head query n"], keys: int
) -> Float[Tensor, "batch head query key"]:
    """The sum of one-hot rows, one for each listed key; columns outside of the keys count for nothing."""
    inside = (columns >= 0) & (columns < keys)
    one_hot = torch.nn.functional.one_hot(columns.clamp(0, max(keys - 1, 0)), keys).double()
    return (one_hot * (weights.double() * inside)[..., None]).sum(-2)


def edges(
    scores: Float[Tensor, "batch head edge"],
    queries: Int[Tensor, " edge"],
    keys: Int[Tensor, " edge"],
    nodes: int,
) -> Float[Tensor, "batch head query key"]:
    """exp(s) over the sum of exp(s) of the query's edges (Veličković et al. 2018, arXiv 1710.10903)."""
    found = torch.zeros(*scores.shape[:2], nodes, nodes, dtype=torch.float64)
    for query in range(nodes):
        own = queries == query
        if own.any():
            found[:, :, query, keys[own]] = scores[:, :, own].double().softmax(-1)
    return found
