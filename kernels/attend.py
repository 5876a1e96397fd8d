"""Attention as a model's forward pass calls it: the output, and the operator of the weights that made it.

`auto` takes torch's fused kernel where it can, running sums for linear attention, and blocks of rows elsewhere; a
backend asked for by name never falls back. `triton` runs when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from headwater.kernels.backends import blocked, flash_edits, linear
from headwater.kernels.backends.triton import backend as triton_backend, launch
from headwater.kernels.edits import WeightEdit, WeightStep
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.reference import dense
from headwater.kernels.rules.fits import check_fit
from headwater.kernels.rules.prepare import prepare
from headwater.kernels.rules.rule import ScoreRule

BACKENDS = ("auto", "flash", "triton", "running", "blocked", "reference")


def choose(
    rule: ScoreRule,
    q: Tensor,
    edits: Sequence[WeightEdit] = (),
    backend: str = "auto",
    value_width: int = 0,
    k: Tensor | None = None,
) -> tuple[str, str]:
    """The backend that will run and why. Raises ValueError where the one asked for can not do it.

    `k` matters where it learns and q does not. The rule is one that `prepare` has left: softmax1 comes as a learned
    sink, sinkhorn as a key bias.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    by_sums = linear.refuses(rule, edits)
    if backend == "running" and by_sums:
        raise ValueError(f"running sums can not compute {by_sums}; use backend='blocked'")
    # the Triton kernels were held to the reference in the interpreter, never yet on a GPU: auto leaves them alone
    fused = "triton" if backend == "triton" else "flash"
    if fused == "triton":
        reason = triton_backend.refuses(rule, q, edits, value_width)
    else:
        reason = flash_edits.refuses(rule, q, edits, k=k)
    if backend == fused and reason:
        raise ValueError(f"{fused} can not compute {reason}; use backend='blocked'")
    if backend != "auto":
        return backend, "asked for by name"
    if by_sums is None:
        return "running", "linear attention as running sums"
    if reason:
        return "blocked", f"{fused} can not compute {reason}"
    return fused, "softmax on the CPU"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: ScoreRule,
    edits: Sequence[WeightEdit] = (),
    backend: str = "auto",
    statistics: Sequence[str] = (),
    differentiable: bool = False,
) -> tuple[Tensor, AttentionMap]:
    """z [batch, head, query, d_value] in v's dtype, and the map.

    `q` [batch, head, query, d_head]; `k`, `v` [batch, kv head, key, d]. Rows without a visible key give zero output.
    `statistics` are names that will be asked of the map: a backend that has them from the same pass leaves them there.
    z always carries gradients. The map does if `differentiable`: its products and statistics then hold a graph of the
    size of the whole map, and come from blocks of rows, as fused kernels have no gradient of their log-sum-exp.
    """
    check_fit(q, k, v, rule, edits)
    given = (q, k, v, rule)
    q, k, rule = prepare(q, k, rule)
    name, _ = choose(rule, q, edits, backend, v.shape[-1], k)
    if differentiable:
        if backend not in ("auto", "blocked"):
            raise ValueError(f"{backend} can not compute a differentiable map; use backend='blocked'")
        z, lse, steps = blocked.attend(q, k, v, rule, edits, differentiable)
        return z.to(v.dtype), AttentionMap.of(q, k, rule, lse, steps, "blocked")
    steps: tuple[WeightStep, ...] = ()
    known: dict[str, Tensor] = {}
    if name == "flash":
        z, lse, steps = flash_edits.attend(q, k, v, rule, edits)
    elif name == "triton":
        wanted = [s for s in statistics if s in launch.PLANES]
        z, lse, steps, known = triton_backend.attend(q, k, v, rule, edits, wanted)
    elif name == "running":
        z, lse = linear.attend(q, k, v, rule)
    elif name == "blocked":
        z, lse, steps = blocked.attend(q, k, v, rule, edits)
    else:
        z, lse, _ = dense.attend(*given, edits)
        if edits:
            steps = blocked.attend(q.double(), k.double(), v.double(), rule, edits)[2]
    asked = "triton" if backend == "triton" else "auto"
    plain = rule.detached()
    return z.to(v.dtype), AttentionMap.of(q.detach(), k.detach(), plain, lse.detach(), steps, asked, known)
