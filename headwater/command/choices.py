"""Which backend `auto` takes for problems that models and edits bring, and why: what `headwater doctor` prints.

The forward pass is asked, without being run; the views of a recorded map (products, statistics) are asked again when
they are wanted, and may go another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater.kernels.rules.rule import ScoreRule


def choices(device: str) -> list[dict[str, Any]]:
    """For each problem the backend of the forward pass on `device`, the reason, and why the others can not do it."""
    import torch

    from headwater.kernels.backends.choose import BACKENDS, choose
    from headwater.kernels.rules.prepare import prepare

    seeded = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 33, 16, generator=seeded).to(device) for heads in (4, 2))
    found = []
    for name, rule, edits in _problems():
        ready = prepare(q, k, rule)
        backend, reason = choose(*ready, edits)
        refusals = {
            fused: BACKENDS[fused].why_not(*ready, edits, value_width=16) for fused in ("flash", "triton")
        }
        entry = {"device": device, "problem": name, "backend": backend.name, "reason": reason}
        found.append(entry | {"refusals": refusals})
    return found


def _problems() -> Iterator[tuple[str, ScoreRule, tuple[Any, ...]]]:
    """Names, score rules and weight edits: 33 tokens, four heads over two key heads."""
    import torch

    from headwater.kernels.edits.patterns import Uniform
    from headwater.kernels.edits.scores import BiasKeys, BlockScores, ScaleScores
    from headwater.kernels.edits.weights import MixIdentity, MixPattern, Rescale, RowCondition
    from headwater.kernels.rules.normaliser import Normaliser
    from headwater.kernels.rules.rule import ScoreRule
    from headwater.kernels.tiles.mask import Mask

    causal = Mask(33, 33, right=0)
    plain = ScoreRule(0.25, causal)
    heads, slopes = torch.tensor([True, True, False, False]), torch.tensor([0.5, 0.25, 0.1, 0.05])
    first = torch.arange(33)[None] < 4
    yield "causal", plain, ()
    yield "bidirectional", replace(plain, mask=Mask(33, 33)), ()
    yield "causal, padding on the left", replace(plain, mask=replace(causal, valid_keys=~first)), ()
    yield "sliding window", replace(plain, mask=replace(causal, left=8)), ()
    yield "packed documents", replace(plain, mask=replace(causal, documents=(~first).long())), ()
    yield (
        "mask given as a function",
        replace(plain, mask=replace(causal, extra=lambda b, h, i, j: i != j)),
        (),
    )
    yield "soft-capped scores", replace(plain, softcap=30.0), ()
    yield "ALiBi", replace(plain, alibi=slopes), ()
    yield "learned sinks", replace(plain, sinks=torch.zeros(4)), ()
    for name in ("softmax1", "sigmoid", "cog", "linear"):
        yield f"normaliser {name}", replace(plain, normaliser=Normaliser(name)), ()
    yield "normaliser sinkhorn", ScoreRule(0.25, Mask(33, 33), normaliser=Normaliser("sinkhorn")), ()
    yield "edit: temperature", replace(plain, edits=(ScaleScores(heads, 0.5),)), ()
    yield "edit: key bias", replace(plain, edits=(BiasKeys(heads, first.float()),)), ()
    yield "edit: knockout of pairs", replace(plain, edits=(BlockScores(heads, ~first, first),)), ()
    yield "edit: redistribute", plain, (Rescale(heads, first, ~first, 0.4),)
    condition = RowCondition(first, ~first, most=1.0, least=0.1)
    yield "edit: redistribute on some rows", plain, (Rescale(heads, first, ~first, 0.4, condition=condition),)
    yield "edit: toward identity", plain, (MixIdentity(heads, 0.5),)
    yield "edit: toward a pattern", plain, (MixPattern(heads, 0.5, Uniform()),)
