"""DAMRO: decoding against a run that sees the outlier patches of its picture alone (Gong et al., EMNLP 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwater.lens.edits.base import Edit
from headwater.lens.edits.scores import Knockout
from headwater.lens.errors import EditError
from headwater.lens.model import HookedModel
from headwater.lens.naming.tokens import Tokens
from headwater.lens.running.branches import Branch


def outlier_patches(
    model: HookedModel, prompt: Any, *, count: int = 10, layer: int = -2, **more: Any
) -> Int[Tensor, "picture count"]:
    """The `count` patches of each picture that the tower's class token attends to most: DAMRO's outlier tokens.

    softmax_j(q·k_j / √C) over the patches, with the queries and keys of all heads beside each other (C features), in
    the tower's layer `layer`, counted from the end where it is below 0. Patches count from 0 in the order of the image
    tokens. Checked against notes of the authors' code. EditError for a tower without a class token.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("llava"))  # random weights, 9 patches
    >>> prompt = zoo.inputs("llava", lengths=(11,))
    >>> hw.recipes.outlier_patches(model, prompt["input_ids"], pixel_values=prompt["pixel_values"], count=2).shape
    torch.Size([1, 2])
    """
    tokens = model.to_tokens(prompt, **more)
    scores = _class_scores(model, tokens, layer)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= scores.shape[1]:
        raise EditError(f"count is a number of patches, 1 to {scores.shape[1]}; got {count!r}")
    return scores.topk(count, dim=-1).indices


def damro(
    model: HookedModel, prompt: Any, *, count: int = 10, alpha: float = 0.5, beta: float = 0.1, layer: int = -2,
    patches: Sequence[Sequence[int]] | None = None, **more: Any,
) -> Branch:  # fmt: skip
    """DAMRO (Gong et al., EMNLP 2024): `model.generate(prompt, against=hw.recipes.damro(model, prompt))`.

    The branch sees the outlier patches of each picture alone (`outlier_patches`), and ℓ* = (1 + alpha)·ℓ - alpha·ℓ',
    where tokens with ℓ < log beta + max ℓ are never chosen. The paper takes 10 of 576 patches, and `alpha` 0.5 for
    questions of yes or no, 1.5 to 2 else. No token can attend to the other image tokens there, so the run is that of a
    shorter prompt whose tokens keep their positions; the authors leave the features out and number what is left anew,
    which rotary positions see. `patches` [picture][patch] names other patches, such as random ones for a control.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("llava"))  # random weights, 9 patches
    >>> prompt = zoo.inputs("llava", lengths=(11,))
    >>> ids, pixels = prompt["input_ids"], prompt["pixel_values"]
    >>> branch = hw.recipes.damro(model, ids, pixel_values=pixels, count=2)
    >>> len(branch.edits[0].keys)  # image tokens that the branch does not see
    7
    >>> model.generate(ids, max_new_tokens=2, pixel_values=pixels, against=branch).shape
    torch.Size([1, 22])
    """
    tokens = model.to_tokens(prompt, **more)
    if patches is None:
        patches = outlier_patches(model, tokens, count=count, layer=layer).tolist()
    picked = model.token_groups(tokens).get("image")
    if picked is None or not picked.any(1).all() or len(patches) != len(tokens):
        raise EditError(
            f"damro takes prompts with one picture each; got {len(tokens)} prompts and {len(patches)} pictures"
        )
    edits: list[Edit] = []
    for row, (image, kept) in enumerate(zip(picked.cpu(), patches, strict=True)):
        first = int(tokens.mask[row].long().argmax())
        places = [n - first for n in image.nonzero()[:, 0].tolist()]
        if bad := [n for n in kept if not 0 <= n < len(places)]:
            raise EditError(f"patch {bad[0]} of picture {row}: it has {len(places)}, counted from 0")
        hidden = [place for n, place in enumerate(places) if n not in kept]
        edits.append(Knockout("all", hidden, rows="all" if len(tokens) == 1 else [row]))
    return Branch(edits, weight=alpha, plausible=beta)


def _class_scores(model: HookedModel, tokens: Tokens, layer: int) -> Float[Tensor, "picture patch"]:
    """Scores of the class token's full-width query against the patches, float64."""
    patches = model.parts["vision"].patches if "vision" in model.parts else None
    if patches is None or "[CLS]" not in patches.special[: patches.prefix]:
        raise EditError(
            f"{model.name} has no tower of images with a class token, whose attention names the patches; give patches="
        )
    view = model.part("vision")
    if not -len(view.layers) <= layer < len(view.layers):
        raise EditError(f"the tower of {model.name} has {len(view.layers)} layers; got layer={layer}")
    record = model.record(tokens, statistics=(), layers="all", keep=("qk",)).parts.get("vision")
    if record is None:
        raise EditError(f"the prompt has no picture; {model.name} must be given one with its text")
    map = record.map(view.layers[layer])
    q, k = map.q.double().cpu(), map.k.double().cpu()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    at = patches.special.index("[CLS]")
    end = k.shape[2] - patches.suffix
    scores = torch.einsum("phd,phkd->pk", q[:, :, at], k[:, :, patches.prefix : end])
    return scores / (q.shape[1] * q.shape[3]) ** 0.5
