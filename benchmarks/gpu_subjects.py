"""What `gpu.py` measures: the problem, our passes, the peers on the same tensors, and the check that all are right.

A peer that is not installed, or that refuses the problem, is named with its reason and not left out in silence.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
import tutorial_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwater.kernels.backends.triton.backend import Triton
from headwater.kernels.backends.triton.launch import rows_pass
from headwater.kernels.edits.weights import Rescale
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

STATISTICS = ("entropy", "max", "argmax", "self", "previous", "first", "distance", "row_mass")
# each new length is compiled anew, which takes several seconds
FLEX_LENGTHS = (4096, 16384, 65536)
# dense maps in float32 and their copies: 32 heads at 8192 tokens are 8.6 GB each
EAGER_LENGTHS = (4096, 8192, 16384)
CHECKED = 512  # tokens; the tutorial's kernel has no tails, ours is checked at 515 too


@dataclass
class Problem:
    """q, k, v [1, head, length, width] in bfloat16, the rule, and an edit of four keys in half of the heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    rule: ScoreRule
    edit: Rescale

    @classmethod
    def of(cls, length: int, width: int, causal: bool, heads: int, device: str) -> Problem:
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, length, width, device=device, dtype=torch.bfloat16) for _ in range(3)
        )
        rule = ScoreRule(width**-0.5, Mask(length, length, right=0 if causal else None))
        sinks = torch.arange(length)[None] < 4
        return cls(q, k, v, rule, Rescale(torch.arange(heads) < heads // 2, sinks, ~sinks, 0.4))

    @property
    def causal(self) -> bool:
        return self.rule.mask.right == 0

    @property
    def on_gpu(self) -> bool:
        return self.q.device.type == "cuda"


def ours(p: Problem) -> dict[str, Callable[[], Any]]:
    """Our passes: the forward pass bare and measured, the key-major pass after it and alone, both, and an edit."""
    q, k, v, rule = p.q, p.k, p.v, p.rule
    lse = Triton().attend(q, k, v, rule).lse

    def record() -> Any:
        result = Triton().attend(q, k, v, rule, (), STATISTICS)
        return result, Triton().received(MapState(q, k, rule, result.lse))

    def received_alone() -> Tensor:
        # what a call that is given no log-sum-exp has to do
        alone = rows_pass(q, k, rule, None, None, None, (), None, None)[1]
        return Triton().received(MapState(q, k, rule, alone))

    return {
        "plain": lambda: Triton().attend(q, k, v, rule),
        "entropy": lambda: Triton().attend(q, k, v, rule, (), ("entropy",)),
        "rows": lambda: Triton().attend(q, k, v, rule, (), STATISTICS),
        "received": lambda: Triton().received(MapState(q, k, rule, lse)),
        "received_alone": received_alone,
        "record": record,
        "edited": lambda: Triton().attend(q, k, v, rule, (p.edit,)),
    }


def peers(p: Problem) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Others' ways to the same output or statistic, and the reason for each that can not be had here."""
    length = p.q.shape[2]
    found: dict[str, Callable[[], Any]] = {
        "tutorial": lambda: tutorial_attention.attend(p.q, p.k, p.v, p.causal, p.rule.scale),
        "sdpa_flash": lambda: _sdpa(p, SDPBackend.FLASH_ATTENTION),
    }
    absent: dict[str, str] = {}
    if p.on_gpu:
        found["sdpa_cudnn"] = lambda: _sdpa(p, SDPBackend.CUDNN_ATTENTION)
    else:
        absent["sdpa_cudnn"] = "needs a GPU"
    if not p.on_gpu or length in FLEX_LENGTHS:
        found["flex"] = _flex(p)
    else:
        absent["flex"] = (
            f"measured at {', '.join(map(str, FLEX_LENGTHS))} only: it compiles every length anew"
        )
    if not p.on_gpu or length in EAGER_LENGTHS:
        found["eager"] = lambda: _eager(p)
    else:
        need = 4 * p.q.shape[1] * length**2
        absent["eager"] = f"its maps alone would take {need / 2**30:.0f} GiB in float32, by calculation"
    if reason := colreduce_absent(p):
        absent["colreduce"] = reason
    else:
        found["colreduce"] = _colreduce(p)
    return found, absent


def colreduce_absent(p: Problem) -> str | None:
    """Why flash-colreduce can not be run, or None where it can."""
    if importlib.util.find_spec("flash_colreduce") is None:
        return "not installed (pip install flash-colreduce; it needs triton < 3.9)"
    try:
        major, minor = (int(n) for n in version("triton").split(".")[:2])
    except PackageNotFoundError:
        return "triton is not installed"
    if (major, minor) >= (3, 9):
        return f"it needs triton < 3.9 (block pointers), here is {major}.{minor}"
    return None if p.on_gpu else "needs a GPU"


def _colreduce(p: Problem) -> Callable[[], Tensor]:
    from flash_colreduce.flash import flash_colreduce  # pyright: ignore[reportMissingImports]

    return lambda: flash_colreduce(p.q, p.k, "sum", p.causal, p.rule.scale)


def _sdpa(p: Problem, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(p.q, p.k, p.v, is_causal=p.causal)


def _flex(p: Problem) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, device = p.q.shape[2], p.q.device.type
    mask = None
    if p.causal:
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, length, length, device=device, _compile=p.on_gpu
        )
    # uncompiled it builds the map, which is enough to see that the call is right
    call = torch.compile(flex_attention, dynamic=False) if p.on_gpu else flex_attention
    return lambda: call(p.q, p.k, p.v, block_mask=mask)


def _eager(p: Problem) -> tuple[Tensor, ...]:
    """The map, and the same statistics from it."""
    scores = (p.q @ p.k.mT).float() * p.rule.scale
    place = torch.arange(scores.shape[-1], device=p.q.device)
    apart = place[:, None] - place
    if p.causal:
        scores.masked_fill_(apart < 0, float("-inf"))
    weights = scores.softmax(-1)
    del scores
    return (
        weights.to(p.v.dtype) @ p.v, torch.special.entr(weights).sum(-1), *weights.max(-1), weights.sum(-2),
        torch.einsum("bhqk,qk->bhq", weights, apart.abs().float()), weights.sum(-1), weights[..., 0],
        weights.diagonal(0, -2, -1), weights.diagonal(-1, -2, -1),
    )  # fmt: skip


class Red(Exception):
    """A result that is further from float64 than its types allow."""


def check(width: int, causal: bool, device: str, length: int) -> dict[str, float]:
    """Largest errors against dense float64; raises `Red` where one exceeds what bfloat16 allows."""
    p = Problem.of(length, width, causal, 4, device)
    host = [x.float().cpu() for x in (p.q, p.k, p.v)]
    errors: dict[str, float] = {}

    def compare(name: str, actual: Tensor, expected: Tensor, allowed: float) -> None:
        errors[name] = float((actual.double().cpu() - expected.double()).abs().max())
        if not errors[name] <= allowed:
            raise Red(
                f"{name} at d={width} causal={causal} {length} tokens: off by {errors[name]:.3g} > {allowed}"
            )

    for title, edits in (("", ()), ("edited ", (p.edit,))):
        result = Triton().attend(p.q, p.k, p.v, p.rule, edits, STATISTICS)
        dense = reference.attend(host[0], host[1], host[2], p.rule, edits)
        wanted = reference.statistics(dense, p.rule)
        # weights are rounded to bfloat16 before they meet the values, and the output once more
        compare(title + "output", result.z, dense.z, 4e-2)
        compare(title + "lse", result.lse, dense.lse, 1e-4)
        for name in STATISTICS:
            if name != "argmax":
                compare(title + name, result.found[name], wanted[name], 5e-2 if name == "distance" else 2e-4)
        top = dense.weights.gather(-1, result.found["argmax"].cpu()[..., None])[..., 0]
        compare(title + "argmax", top, wanted["max"], 2e-4)
        map = AttentionMap.of(p.q, p.k, p.rule, result.lse, result.steps, "triton")
        compare(title + "received", map.statistic("received"), wanted["received"], 2e-3)
        ones = torch.ones(length, 1, device=device)
        compare(title + "P^T 1", (map.T @ ones)[..., 0], wanted["received"], 5e-3)
        if not torch.equal(map.received(), map.received()):
            raise Red("the key-major pass gave other bits in a second run")
        if not edits:
            _check_peers(p, dense, wanted["received"], compare)
    return errors


def _check_peers(p: Problem, dense: reference.Dense, received: Tensor, compare: Callable[..., None]) -> None:
    found, _ = peers(p)
    if p.q.shape[2] % 128 == 0:
        z, lse = found["tutorial"]()
        compare("tutorial output", z, dense.z, 4e-2)
        compare("tutorial lse", lse, dense.lse, 1e-4)
    if "colreduce" in found:
        # it returns the type of its queries
        compare("colreduce", found["colreduce"](), received, 2e-2 * float(received.max()))
