"""Attention as a model's forward pass calls it: the output, and the operator of the weights that made it.

`auto` takes the fused kernel where it can and blocks of rows elsewhere; a backend asked for by name never falls back.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from headwater.kernels import blocked, flash, reference
from headwater.kernels.edits import WeightEdit, WeightStep
from headwater.kernels.operator import AttentionMap
from headwater.kernels.rule import ScoreRule

BACKENDS = ("auto", "flash", "blocked", "reference")


def choose(
    rule: ScoreRule, q: Tensor, edits: Sequence[WeightEdit] = (), backend: str = "auto"
) -> tuple[str, str]:
    """The backend that will run and why. Raises ValueError where the one asked for can not do it."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    reason = "edited weights" if edits else flash.refuses(rule, q)
    if backend == "flash" and reason:
        raise ValueError(f"flash can not compute {reason}; use backend='blocked'")
    if backend != "auto":
        return backend, "asked for by name"
    if reason is None:
        return "flash", "plain softmax on the CPU"
    return "blocked", f"flash can not compute {reason}"


def attend(
    q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, edits: Sequence[WeightEdit] = (), backend: str = "auto"
) -> tuple[Tensor, AttentionMap]:
    """z [batch, head, query, d_value] in v's dtype, and the map.

    `q` [batch, head, query, d_head]; `k`, `v` [batch, kv head, key, d]. Rows without a visible key give zero output.
    """
    name, _ = choose(rule, q, edits, backend)
    steps: tuple[WeightStep, ...] = ()
    if name == "flash":
        z, lse = flash.attend(q, k, v, rule)
    elif name == "blocked":
        z, lse, steps = blocked.attend(q, k, v, rule, edits)
    else:
        z, lse, _ = reference.attend(q, k, v, rule, edits)
        if edits:
            steps = blocked.attend(q.double(), k.double(), v.double(), rule, edits)[2]
    return z.to(v.dtype), AttentionMap.of(q.detach(), k.detach(), rule, lse.detach(), steps)
