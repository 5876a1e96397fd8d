"""Attention as a model's forward pass calls it: the output, and the operator of the weights that made it.

`auto` takes torch's fused kernel where it can and blocks of rows elsewhere; a backend asked for by name never falls
back. `triton` runs when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from headwater.kernels import blocked, flash, reference, triton_backend, triton_launch
from headwater.kernels.edits import WeightEdit, WeightStep
from headwater.kernels.operator import AttentionMap
from headwater.kernels.rule import ScoreRule

BACKENDS = ("auto", "flash", "triton", "blocked", "reference")


def choose(
    rule: ScoreRule,
    q: Tensor,
    edits: Sequence[WeightEdit] = (),
    backend: str = "auto",
    value_width: int = 0,
) -> tuple[str, str]:
    """The backend that will run and why. Raises ValueError where the one asked for can not do it."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    # the Triton kernels were held to the reference in the interpreter, never yet on a GPU: auto leaves them alone
    fused = "triton" if backend == "triton" else "flash"
    if fused == "triton":
        reason = triton_backend.refuses(rule, q, edits, value_width)
    else:
        reason = "edited weights" if edits else flash.refuses(rule, q)
    if backend == fused and reason:
        raise ValueError(f"{fused} can not compute {reason}; use backend='blocked'")
    if backend != "auto":
        return backend, "asked for by name"
    if reason:
        return "blocked", f"{fused} can not compute {reason}"
    return fused, "plain softmax on the CPU"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: ScoreRule,
    edits: Sequence[WeightEdit] = (),
    backend: str = "auto",
    statistics: Sequence[str] = (),
) -> tuple[Tensor, AttentionMap]:
    """z [batch, head, query, d_value] in v's dtype, and the map.

    `q` [batch, head, query, d_head]; `k`, `v` [batch, kv head, key, d]. Rows without a visible key give zero output.
    `statistics` are names that will be asked of the map: a backend that has them from the same pass leaves them there.
    """
    name, _ = choose(rule, q, edits, backend, v.shape[-1])
    steps: tuple[WeightStep, ...] = ()
    known: dict[str, Tensor] = {}
    if name == "flash":
        z, lse = flash.attend(q, k, v, rule)
    elif name == "triton":
        wanted = [s for s in statistics if s in triton_launch.PLANES]
        z, lse, steps, known = triton_backend.attend(q, k, v, rule, edits, wanted)
    elif name == "blocked":
        z, lse, steps = blocked.attend(q, k, v, rule, edits)
    else:
        z, lse, _ = reference.attend(q, k, v, rule, edits)
        if edits:
            steps = blocked.attend(q.double(), k.double(), v.double(), rule, edits)[2]
    asked = "triton" if backend == "triton" else "auto"
    return z.to(v.dtype), AttentionMap.of(q.detach(), k.detach(), rule, lse.detach(), steps, asked, known)
