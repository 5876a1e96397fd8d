"""Effects of patches estimated from one backward pass, for all cells at once: attribution patching and its rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headwater.analyses._measures.pair_scores import Asked, How
from headwater.analyses._prompts.examples import differentiable, joined, outputs_of
from headwater.analyses._prompts.pairs import Pairs
from headwater.analyses._runs.replace_activations import Swap
from headwater.analyses.circuits._patch_cells import Cells, replacement
from headwater.lens.attention import backward_rules
from headwater.lens.attention.backward_rules import BackwardRule
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.transformer_lens import names
from headwater.lens.transformer_lens.run import Run

ESTIMATED = ("head", "head_position", "residual", "attention", "mlp")


def refuse_what(cells: Cells) -> None:
    """AnalysisError for cells that are not what a part of the model writes or reads."""
    if cells.what not in ESTIMATED:
        raise AnalysisError(
            f"estimate= is for what={', '.join(ESTIMATED)}, not for {cells.what!r}; leave it out to run every cell"
        )


def estimated(
    model: HookedModel, pairs: Pairs, asked: Asked, cells: Cells, layers: list[int], how: How, ablation: Ablation,
    rule: BackwardRule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The measures of both sides [2, pair], and effects [pair, layer, …]: `Σ_d slope · (other - own)` of each cell,
    with the slope taken in the run that is patched."""
    base, other = (pairs.corrupt, pairs.clean) if how == "denoise" else (pairs.clean, pairs.corrupt)
    count, sites = len(pairs.places), [cells.name(layer) for layer in layers]
    seen = Swap(model, 2 * count, keep=sites)
    logits = seen.logits(joined([base, other]), None)
    halves = (logits[count:], logits[:count]) if how == "denoise" else (logits[:count], logits[count:])
    told = asked.told(model, pairs, *halves)
    slopes = _slopes(model, base, told.value, sites, rule)
    found = []
    for site, slope in zip(sites, slopes, strict=True):
        own, theirs = seen.cache[site].chunk(2)
        change = replacement(theirs, ablation) - own
        found.append(cells.by_cell((slope * change).double().sum(-1).cpu()))
    estimate = torch.stack(found).movedim(1, -1)  # [layer, …, pair]
    return told.ends, told.effect(told.unpatched(how) + estimate, how).movedim(-1, 0)


def _slopes(
    model: HookedModel, ids: Tensor, value: Callable[[Tensor], Tensor], sites: list[str], rule: BackwardRule
) -> list[Tensor]:
    """What flows back to each site under the rule."""
    leaves: dict[str, Tensor] = {}

    def site(tensor: Tensor, hook: Any) -> Tensor:
        leaves[hook.name] = torch.zeros_like(tensor).requires_grad_()
        return tensor + leaves[hook.name]

    places = [names.check(model, name) for name in sites]
    run = Run(model, places, len(ids), forward={name: [site] for name in sites})
    with run.on(), torch.enable_grad(), backward_rules.following(rule):
        total = differentiable(value(outputs_of(model)(ids, grad=True)), "the measure").sum()
        return list(torch.autograd.grad(total, [leaves[name] for name in sites], materialize_grads=True))
