"""Recipes that remove image tokens inside the run, by the flow of information: FlowCut and VFlowOpt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headwater.lens.edits.base import Edit
from headwater.lens.edits.prune_tokens import PruneTokens
from headwater.lens.edits.token_scores import patch_entropy
from headwater.lens.errors import EditError
from headwater.lens.model import HookedModel
from headwater.lens.naming.positions import Positions


def flowcut(
    model: HookedModel, keep: int | float, behind: int | None = None, positions: Positions = "image"
) -> list[Edit]:
    """FlowCut (Tong et al. 2025): at every second layer up to `behind` patches go, until `keep` are left there.

    The score is `(a_j/Σa + s_j/Σs)·‖v_j‖₁`, carried on over the layers, and the number that goes
    `(N - keep)/√left · (1 - (H/log N)²)` with H the entropy of the class token's attention and `left` the layers up to
    `behind`. By default that is the third layer from the last, as in the code, whose model reads the second from the
    last. `keep` is a number of tokens, or a share as a float. Give the tower of a model that also reads text:
    `recipes.flowcut(model.part("vision"), 64)` for `model.part("vision").edit(…)`. Checked against the loop of
    TungChintao/FlowCut on a ViT. Not as there: the language model reads the tokens that are left at their old
    positions, where the code numbers them anew.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> tower = hw.load(zoo.build("llava")).part("vision")
    >>> hw.recipes.flowcut(tower, 4, behind=0)[0].to_python()
    "hw.PruneTokens(keep={'0': 4}, score='flow', adaptive=True)"
    """
    layers = model.layers
    place = layers[max(len(layers) - 3, 0)] if behind is None else behind
    return [PruneTokens({place: keep}, "flow", positions, adaptive=True)]


def vflowopt(
    model: HookedModel, keep: Mapping[int, int | float], pixels: Tensor | None = None, mix: float = 0.5,
    recycle: int = 1, positions: Positions = "image",
) -> list[Edit]:  # fmt: skip
    """VFlowOpt (Yang et al. 2025), from memory of its abstract: stages by hand, recycled tokens, attention and entropy.

    Behind each layer of `keep` as many image tokens are left as it says; the score is `(1 - mix)·a + mix·H`, both as
    shares, with a the last token's attention and H the entropy of the grey levels of each patch of `pixels`
    [picture, channel, height, width], one picture for each text (without `pixels` it is a alone). `recycle` further
    tokens stay at each stage, each the mean, weighted by similarity, of removed tokens like it. The paper finds the
    stages and the mixing by Bayesian optimisation of the last token's drift, which `analyses.pruning_curve` measures;
    here they are given.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model, given = hw.load(zoo.build("llava")), zoo.inputs("llava")
    >>> with model.edit(*hw.recipes.vflowopt(model, {0: 3}, given["pixel_values"])):
    ...     logits = model(**given)
    >>> int((~logits[0].isnan().any(-1)).sum()), logits.shape[1]  # 9 patches become 3, and one recycled token
    (15, 20)
    """
    prior = None
    if pixels is not None:
        patches = model.parts["vision"].patches if "vision" in model.parts else None
        if patches is None or not isinstance(pixels, Tensor) or pixels.dim() != 4:
            raise EditError(
                f"vflowopt: pixels are [picture, channel, height, width] of a tower with patches; {model.name} has "
                + ("none" if patches is None else f"them, and got {_said(pixels)}")
            )
        prior = patch_entropy(pixels, patches.size)
        if not bool((prior.sum(-1) > 0).all()):
            prior = torch.where(prior.sum(-1, keepdim=True) > 0, prior, 1.0)  # a picture of one grey
    return [PruneTokens(keep, "attention", positions, recycle=recycle, prior=prior, mix=mix)]


def _said(given: Any) -> str:
    return f"shape {list(given.shape)}" if isinstance(given, Tensor) else repr(given)[:60]
