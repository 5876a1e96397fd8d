"""`refuse_unfit`: whether a model's later layers can run on fewer tokens, held to a run that hides the removed ones."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headwater.lens.attention import context
from headwater.lens.edits.base import Prepared
from headwater.lens.edits.block import EditBlock
from headwater.lens.edits.named_positions import Names
from headwater.lens.edits.pruning import Plan, Pruning
from headwater.lens.edits.scores import Knockout
from headwater.lens.errors import EditError, HeadwaterError
from headwater.lens.models import blocks
from headwater.lens.models.opened import Opened
from headwater.lens.running.watching import watching

FAR = 1e-3  # of the largest state: further apart than rounding
_checked: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # "" for a part that fits


def refuse_unfit(model: Opened) -> None:
    """EditError, with the reason, for a part in which no token can be removed."""
    first = model.attention_module(model.layers[0])
    if first not in _checked:
        _checked[first] = _unfit(model)
    if why := _checked[first]:
        raise EditError(f"PruneTokens: no token of {model.name} ({model.part_name}) can be removed: {why}")


def refuse_merged(model: Opened) -> None:
    """EditError for the tower of a language model that reads several patches as one image token."""
    pixels, ids = model.sample.get("pixel_values"), model.sample.get("input_ids")
    patches = model.parts[model.part_name].patches
    if patches is None or pixels is None or ids is None or pixels.dim() < 4:
        return
    count = (patches.count(pixels) - patches.prefix - patches.suffix) * pixels[..., 0, 0, 0].numel()
    tokens = int((ids == model.image_token).sum())
    if 2 * tokens <= count:  # crops and line breaks change the number by less
        raise EditError(
            f"PruneTokens: {model.name} makes one image token of several patches ({tokens} of {count} on its sample): "
            "a removed patch would take others along; remove image tokens: model.edit(hw.PruneTokens(…))"
        )


def _unfit(model: Opened) -> str:
    part = model.parts[model.part_name]
    if part.crosses or model.is_encoder_decoder:
        return "other layers read its tokens at their places"
    if any(step.kind == "mixer" for block in part.stack for step in block.steps):
        return "some of its layers are no attention and carry every token on"
    if len(model.layers) < 2:
        return "it has one layer"
    if not model.sample:
        return "it was opened without inputs on which that could be tried"
    try:
        blocks.refuse_several_streams(model)
        # the first patch, or the second token of a text
        place = part.patches.prefix if part.patches is not None else 1
        found, expected = (_last_states(model, made(model, place)) for made in (_pruned, _hidden))
    except HeadwaterError as error:
        return str(error).removeprefix("PruneTokens: ")
    except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
        return f"its later layers do not run on fewer tokens ({' '.join(str(error).split()):.120})"
    kept = ~found.isnan().any(-1)
    if found.shape != expected.shape or found.dim() != 3 or bool(kept.all()):
        return "its blocks do not hand on one state for each token"
    real = model.sample.get("attention_mask")
    if real is not None and real.shape == kept.shape:  # what stands on padding means nothing
        kept = kept & real.bool().to(kept.device)
    apart = (found - expected)[kept].abs().max() / expected.abs().max()
    if not apart <= FAR:
        return (
            f"its layers place tokens by their number (states differ by {float(apart):.2g} on a short input)"
        )
    return ""


def _pruned(model: Opened, place: int) -> Sequence[Prepared]:
    """One token is removed behind the first layer."""
    names = Names(model)
    plan = Plan({model.layers[0]: 0}, "values", [place])
    return [Prepared(_Removed(), {}, names, hooks=Pruning(model, names, plan).hooks())]


def _hidden(model: Opened, place: int) -> Sequence[Prepared]:
    """The same token is hidden from all later layers."""
    return [Knockout("all", [place], layers=model.layers[1:]).prepare(model)]


class _Removed(Knockout):
    """Stands for the edit that the check puts on."""

    shortens = True

    def __init__(self) -> None:
        super().__init__([], [])


def _last_states(model: Opened, prepared: Sequence[Prepared]) -> Tensor:
    last = blocks.block(model, model.layers[-1]).module
    with (
        context.alone(model.key),
        torch.no_grad(),
        EditBlock(model, prepared),
        watching([last]) as calls,
    ):
        model.hf(**model.sample)
    return calls[-1].output.float()
