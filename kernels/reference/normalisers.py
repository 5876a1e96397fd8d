"""Every normaliser written as its formula, on dense float64 scores. This file defines what each of them means.

`products` gives the scores before cap, bias and edits; `weights` takes them masked (-inf is hidden) and gives the map
and the logarithm of each row's denominator. Formulas and sources: `normaliser.py`, whose code is not used here.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwater.kernels.tiles.shapes import PerQuery, Queries, Weights


def products(
    q: Queries, k: Float[Tensor, "batch head key d_head"], kind: str, features: str | None, scale: float,
    seen: Bool[Tensor, "batch head query key"],
) -> Weights:  # fmt: skip
    """Scores before cap, bias and edits; `seen` says which keys each query sees."""
    if kind == "linear":
        phi = {
            "elu1": lambda x: torch.where(x > 0, x + 1, torch.exp(x)),
            "relu": lambda x: torch.where(x > 0, x, 0.0),
            "identity": lambda x: x,
        }[str(features)]
        return phi(q) @ phi(k).mT
    if kind == "lssa":
        unit_q, unit_k = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (q, k))
        count = seen.sum(-1, keepdim=True).clamp_min(1).double()
        return math.log(q.shape[-1]) * count.log() * (unit_q @ unit_k.mT)
    return scale * q @ k.mT


def weights(
    scores: Weights, sink: Float[Tensor, "#batch #head #query 1"] | None, kind: str, **parameters
) -> tuple[Weights, PerQuery]:
    """The map and ln Z; no weights and -inf on a row that sees nothing.

    `sink` is a key whose value is 0. `kind` is not sinkhorn.
    """
    hidden = scores == -torch.inf
    # a row that sees nothing is computed as if it saw all, and emptied afterwards: the formulas would divide 0 by 0
    scores = torch.where(hidden.all(-1, keepdim=True), 0.0, scores)
    columns = [scores] if sink is None else [scores, sink.double().expand(*scores.shape[:3], 1)]
    if kind == "softmax1":
        columns.append(torch.zeros(*scores.shape[:3], 1, dtype=scores.dtype))
    every = torch.cat(columns, -1)
    if kind in ("softmax", "softmax1"):
        found, log_z = every.softmax(-1), every.logsumexp(-1)
    elif kind == "cog":
        size = torch.where(every > -torch.inf, every, 0.0).abs()
        size = torch.where(every > -torch.inf, size, -torch.inf)
        found, log_z = every.sign() * size.softmax(-1), size.logsumexp(-1)
    else:
        f = similarity(torch.where(every > -torch.inf, every, 0.0), kind, parameters)
        f = torch.where(every > -torch.inf, f, 0.0)
        z = denominator(f.sum(-1), kind, parameters)
        found, log_z = f / torch.where(z > 0, z, 1.0)[..., None], z.log()
    found = found[..., : scores.shape[-1]]
    silent = hidden.all(-1) | (log_z == -torch.inf)
    log_z = torch.where(silent, -torch.inf, log_z)
    return torch.where(hidden | silent[..., None], 0.0, found), log_z


def similarity(s: Tensor, kind: str, parameters: dict) -> Tensor:
    """f(s) of the normalisers whose f does not overflow."""
    if kind in ("sigmoid", "sigmoid_normalised"):
        return 1 / (1 + torch.exp(-(s + parameters["bias"])))
    if kind in ("softplus", "lssa"):
        return torch.logaddexp(s, torch.zeros_like(s))
    if kind == "elu1":
        return torch.where(s > 0, s + 1, torch.exp(s))
    assert kind in ("linear", "products")
    return s


def denominator(total: Tensor, kind: str, parameters: dict) -> Tensor:
    """Z of each row from the sum of f over its keys."""
    if kind == "sigmoid" or parameters.get("normalise") is False:
        return torch.ones_like(total)
    if kind in ("softplus", "lssa"):
        return total + 1e-8
    if kind in ("linear", "products"):
        return total.abs().clamp_min(1.0) if parameters["features"] == "identity" else total.abs()
    return total


def sinkhorn(
    scores: Weights, iterations: int, queries: Bool[Tensor, "#batch query"], keys: Bool[Tensor, "#batch key"]
) -> tuple[Weights, PerQuery]:
    """Doubly stochastic weights by Sinkhorn's iterations in the log domain, and ln Z = -(u + ln n).

    `queries` and `keys` mark the real ones, with the marginals 1/n and 1/m.
    """
    log_n, log_m = (real.sum(-1).clamp_min(1).double().log()[:, None, None] for real in (queries, keys))
    row_sees = (scores > -torch.inf).any(-1)
    real_rows = row_sees & queries[:, None]
    column_seen = ((scores > -torch.inf) & real_rows[..., None]).any(-2)
    v = torch.zeros(*scores.shape[:2], scores.shape[3], dtype=scores.dtype)
    u = torch.zeros(scores.shape[:3], dtype=scores.dtype)
    for t in range(iterations):
        if t % 2 == 0:
            u = -log_n - (scores + v[:, :, None]).logsumexp(-1)
        else:
            among = torch.where(real_rows[..., None], scores + u[..., None], -torch.inf)
            v = torch.where(column_seen, -log_m - among.logsumexp(-2), 0.0)
    found = log_n.exp()[..., None] * torch.exp(scores + u[..., None] + v[:, :, None])
    silent = ~row_sees
    return torch.where(silent[..., None], 0.0, found), torch.where(silent, -torch.inf, -(u + log_n))
