"""`PruneTokens`: remove tokens behind a layer, so that all later layers really run on a shorter sequence.

What is kept is what a run gives in which the removed tokens are hidden from all others in the later layers. A short run
at the first use of a model holds it to that (`pruning_check.py`), and a model whose blocks place tokens in another way
is refused. `pruning.py` has the hooks, `token_scores.py` the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.edits.base import Edit, ModuleHook, Prepared, number, singles
from headwater.lens.edits.named_positions import NO_GROUPS, Names
from headwater.lens.edits.pruning import Plan, Pruning
from headwater.lens.edits.pruning_check import refuse_merged, refuse_unfit
from headwater.lens.errors import EditError, nearest
from headwater.lens.models.axes import TEXTS
from headwater.lens.models.opened import Opened
from headwater.lens.naming.heads import chosen_layers
from headwater.lens.naming.positions import Positions

__all__ = ["PruneTokens"]

SCORES = ("flow", "attention", "values", "random")


@dataclass(frozen=True, eq=False)
class PruneTokens(Edit):
    """Keep only the tokens with the largest scores: `keep={layer: n}` leaves n of the `positions` behind that layer.

    n is a number of tokens or, as a float, a share of them. `score`: "attention" (of the class token, or of the last
    token of a language model, in that layer), "values" (‖v‖₁), "flow" (FlowCut, over the layers so far), "random", or
    numbers [token] or [batch, token] for the positions in their order (edits/token_scores.py has the formulas).
    `prior`, numbers of the same form such as the entropy of patches, is mixed in: `(1 - mix)·score + mix·prior`, both
    as shares of their sums (VFlowOpt, from memory). `adaptive=True` is FlowCut's schedule: `keep={layer: n}` is reached
    at that layer, and at every second layer below it as many go as the entropy of the attention says. `recycle=m`
    keeps m further tokens at each layer, each the mean of the removed tokens that are most like it, weighted by their
    similarity (VFlowOpt's recycled tokens, from memory). The token that reads is always kept. Outputs of removed tokens
    are NaN.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> edit = hw.PruneTokens({1: 3}, score="attention", positions=slice(0, 5))
    >>> with model.edit(edit):
    ...     weights = model.record("Mary gave John a drink").pattern(2, 0)[0, -1]
    >>> int((weights > 0).sum()), edit.to_python()
    (4, "hw.PruneTokens(keep={'1': 3}, positions=slice(0, 5, None))")
    """

    shortens = True

    keep: Mapping[int, int | float]
    score: Any = "attention"
    positions: Positions = "image"
    adaptive: bool = False
    recycle: int = 0
    prior: Any = None
    mix: float = 0.5
    seed: int = 0

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        refuse_unfit(model)
        stages = self._stages(model)
        given, prior = _numbers(self.score, "score"), _numbers(self.prior, "prior")
        for what, numbers in {"score": given, "prior": prior}.items():
            if prior is not None and numbers is not None and bool((numbers < 0).any()):
                raise EditError(
                    f"PruneTokens: with a prior both are taken as shares of their sums, and {what} goes down to "
                    f"{float(numbers.min()):.3g}; give numbers of 0 or more"
                )
        number(self.mix, "mix", "PruneTokens", 0.0, 1.0)
        for name in ("recycle", "seed"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int) or value < 0:
                raise EditError(f"PruneTokens: {name} must be a whole number, 0 or more; got {value!r:.60}")
        names = Names(model, groups)
        names.check(self.positions, "PruneTokens: positions")
        name = self.score if given is None else "given"
        plan = Plan(
            stages, name, self.positions, self.adaptive, self.recycle, self.mix, self.seed, given, prior
        )
        hooks = Pruning(model, names, plan).hooks()
        if model.parts[model.part_name].queries not in TEXTS:
            hooks = (*hooks, ModuleHook(model.hf, after=_refuse_nothing))
            behind = [n for n, p in model.parts.items() if p.causal and p.queries == "text" and not p.crosses]
            if behind and model.image_token is not None:
                refuse_merged(model)
            for reading in map(model.part, behind if model.image_token is not None else ()):
                refuse_unfit(reading)
                hooks = (*hooks, *Pruning(reading, Names(reading)).hooks())
        prepared = Prepared(self, {}, names)
        return replace(prepared, hooks=hooks)

    def named_positions(self) -> list[Positions]:
        return [self.positions]

    def _stages(self, model: Opened) -> dict[int, int | float]:
        """What is left behind each layer, in order."""
        if not isinstance(self.keep, Mapping) or not self.keep:
            raise EditError(
                f"PruneTokens: keep gives what is left behind a layer, as in {{2: 0.5}}; got {self.keep!r:.60}"
            )
        found: dict[int, int | float] = {}
        for layer, left in self.keep.items():
            place = int(layer) if isinstance(layer, str) and layer.isdecimal() else layer
            if not isinstance(place, int) or isinstance(place, bool):
                raise EditError(
                    f"PruneTokens: keep names each layer by its number, as in {{2: 0.5}}; got {layer!r:.40}"
                )
            (place,) = chosen_layers(place, model.layers)
            if place in found:
                raise EditError(
                    f"PruneTokens: keep names layer {place} twice; say once what is left behind it"
                )
            number(left, f"keep behind layer {place}", "PruneTokens", 0.0)
            if (isinstance(left, float) and left > 1) or not isinstance(left, int | float):
                raise EditError(
                    f"PruneTokens: keep is a number of tokens such as 64, or a share from 0.0 to 1.0; got {left!r:.40}"
                )
            found[place] = left
        if self.adaptive is not True and self.adaptive is not False:
            raise EditError(f"PruneTokens: adaptive is True or False; got {self.adaptive!r:.40}")
        if self.adaptive and len(found) != 1:
            raise EditError(f"PruneTokens: adaptive=True takes one layer with its target; got {len(found)}")
        if model.layers[-1] in found:
            raise EditError(
                f"PruneTokens: layer {model.layers[-1]} is the last, so nothing would run on fewer tokens; name an "
                "earlier one"
            )
        return dict(sorted(found.items()))


def _numbers(given: Any, what: str) -> Tensor | None:
    """Numbers [token] or [batch, token] as float32; None for a name or nothing."""
    if isinstance(given, str):
        if what == "score" and given in SCORES:
            return None
        raise EditError(f"PruneTokens: unknown score {given!r:.40}: {nearest(given, SCORES)}")
    if given is None and what == "prior":
        return None
    try:
        found = torch.from_numpy(singles(given).copy())
    except (TypeError, ValueError):
        found = torch.empty(0)
    if found.dim() not in (1, 2) or not found.numel() or not found.isfinite().all():
        raise EditError(
            f"PruneTokens: {what} must be finite numbers [token] or [batch, token]; got {given!r:.60}"
        )
    return found


def _refuse_nothing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """EditError where what a tower gives of a picture was made of removed tokens too."""
    for name in ("logits", "pooler_output", "image_embeds"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor) and found.dim() == 2 and bool(found.isnan().any()):
            raise EditError(
                f"PruneTokens: {name} of {type(module).__name__} is made of all patches, and removed ones have none; "
                "hide them from the later layers with hw.Knockout"
            )
