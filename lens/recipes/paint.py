"""PAINT (Arif et al. 2025): emphasis on chosen image tokens, in heads that are sensitive to the image.

Token selection and emphasis are checked against the authors' code. Their abstract tells of a modulation by "measured
visual sensitivity of individual attention heads"; their code has none, so the measures of sensitivity here are ours.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.lens.edits.base import Edit
from headwater.lens.edits.scores import Emphasise, Knockout
from headwater.lens.errors import EditError
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head, Heads, Layers, chosen_layers
from headwater.lens.naming.tokens import Tokens
from headwater.lens.recipes.image_tokens import image_tokens, require_followed

MEASURES = ("mass", "change")
RANKINGS = ("class", "received")


def visual_emphasis(
    model: HookedModel, prompt: Any, *, alpha: float = 0.7, beta: float = 0.35, share: float = 0.25,
    heads: Heads = "all", layers: Layers = "all", rank: Literal["class", "received"] = "class", **more: Any,
) -> list[Edit]:  # fmt: skip
    """PAINT (Arif et al. 2025): raise the scores of local and summary image tokens, for the last query.

    s_j ← s_j + alpha·|s_j| on local tokens and s_j + beta·|s_j| on summary tokens. Both go by the attention of the
    class token to the patches, summed over heads. Local tokens: the `share` of patches with most of it in the vision
    encoder's first layer. Summary tokens: the patches with most of it in the last layer but one, as many as lie above
    Q3 + 1.5·IQR there, without the local ones. Checked against the code (there beta is 0.3 to 0.4).

    `heads="sensitive"` limits it to half of the heads of each layer, those that `sensitive_heads` finds on this prompt
    (ours). `rank="received"` goes by the attention that a patch receives from all patches, for encoders without a class
    token (ours); with "class" these are refused.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("llava"))  # random weights
    >>> prompt = zoo.inputs("llava", lengths=(11,))  # input_ids, attention_mask, pixel_values
    >>> edits = hw.recipes.visual_emphasis(model, prompt["input_ids"], pixel_values=prompt["pixel_values"])
    >>> [(edit.amount, edit.queries) for edit in edits]  # local tokens, then summary tokens
    [(0.7, -1), (0.35, -1)]
    """
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise EditError(f"visual_emphasis: share is a number from 0 to 1; got {share!r}")
    tokens = model.to_tokens(prompt, **more)
    picked = image_tokens(model, tokens, "image")
    vision = model.record(tokens, statistics=(), layers="all", keep=("qk",)).parts.get("vision")
    if vision is None or len(vision.layers) < 2 or len(picked) != 1:
        raise EditError(
            f"visual_emphasis needs one prompt with an image and a vision encoder of two layers or more; {model.name} "
            f"has {'none that ran' if vision is None else f'{len(vision.layers)} layers and {len(picked)} prompts'}"
        )
    if rank not in RANKINGS:
        raise EditError(f"visual_emphasis: rank is one of {', '.join(RANKINGS)}; got {rank!r}")
    patches = model.parts["vision"].patches
    if rank == "class" and (patches is None or patches.prefix < 1):
        raise EditError(
            f"visual_emphasis reads the attention of a class token, and {model.name} has none; "
            "take a model with one, or rank='received'"
        )
    length = vision.tokens.shape[1]
    inside = slice(0, length) if patches is None else slice(patches.prefix, length - patches.suffix)
    asking = inside if rank == "received" else slice(0, 1)
    first, last = (
        vision.pattern(layer, queries=asking, keys=inside).sum((1, 2)).flatten()
        for layer in (vision.layers[0], vision.layers[-2])
    )
    places = [n - int(tokens.mask[0].long().argmax()) for n in picked[0].nonzero()[:, 0].tolist()]
    if len(first) != len(places):
        raise EditError(
            f"visual_emphasis: the vision encoder has {len(first)} patches and the text {len(places)} image tokens; "
            "which is which is not known"
        )
    if isinstance(heads, str) and heads == "sensitive":
        heads = sensitive_heads(model, tokens, layers=layers)
    local, summary = emphasised_tokens(first, last, share)
    return [
        Emphasise([places[n] for n in local], alpha, queries=-1, heads=heads, layers=layers),
        Emphasise([places[n] for n in summary], beta, queries=-1, heads=heads, layers=layers),
    ]


def emphasised_tokens(
    first: Float[Tensor, " patch"], last: Float[Tensor, " patch"], share: float = 0.25
) -> tuple[list[int], list[int]]:
    """PAINT's local and summary patches, from the class token's attention [patch] in two layers."""
    local = first.topk(int(len(first) * share)).indices.tolist()
    low, high = torch.quantile(last.double(), torch.tensor([0.25, 0.75], dtype=torch.double)).tolist()
    count = int((last > high + 1.5 * (high - low)).sum())
    return local, [n for n in last.topk(count).indices.tolist() if n not in local]


def sensitive_heads(
    model: HookedModel, prompts: Any, *, measure: Literal["mass", "change"] = "change", share: float = 0.5,
    layers: Layers = "all", **more: Any,
) -> list[Head]:  # fmt: skip
    """The `share` of the heads of each layer that are most sensitive to the image, by the mean over prompts (ours).

    The layers stand in their order, and in each the heads, the most sensitive first. `visual_sensitivity` says what is
    measured. At least one head of a layer is taken. Choose heads on other prompts than those on which they are judged.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("llava"))  # random weights, 4 heads
    >>> prompt = zoo.inputs("llava", lengths=(11, 11))
    >>> ids, pixels = prompt["input_ids"], prompt["pixel_values"]
    >>> [head.layer for head in hw.recipes.sensitive_heads(model, ids, pixel_values=pixels)]
    [0, 0, 1, 1]
    """
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise EditError(f"sensitive_heads: share is above 0 and at most 1; got {share!r}")
    found = visual_sensitivity(model, prompts, measure=measure, **more).mean(0)
    count = max(round(share * model.n_heads), 1)
    return [
        Head(layer, head)
        for place, layer in enumerate(model.layers)
        if layer in chosen_layers(layers, model.layers)
        for head in found[place].topk(count).indices.tolist()
    ]


def visual_sensitivity(
    model: HookedModel, prompts: Any, *, measure: Literal["mass", "change"] = "change", **more: Any
) -> Float[Tensor, "batch layer head"]:
    """How sensitive each head is to the image at the last token of each prompt, float64 [batch, layer, head].

    Each prompt has an image, and text behind it.

    "mass": Σ(image) A_ij of the last row i, from 0 to 1. "change": ‖z - z'‖₂ / ‖z‖₂ of the head's output z before the
    output projection, where in the run of z' no token behind the image sees it. Both are ours (see the top of this
    file); "change" is the divergence of VHR with the image hidden and not left out, so that no position moves, and
    divided by the length of z, so that layers can be compared. One forward pass, or two.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("llava"))  # random weights
    >>> prompt = zoo.inputs("llava", lengths=(11, 11))
    >>> ids, pixels = prompt["input_ids"], prompt["pixel_values"]
    >>> hw.recipes.visual_sensitivity(model, ids, pixel_values=pixels, measure="mass").shape
    torch.Size([2, 2, 4])
    """
    if measure not in MEASURES:
        raise EditError(f"visual_sensitivity: measure is one of {', '.join(MEASURES)}; got {measure!r}")
    tokens = model.to_tokens(prompts, **more)
    image = image_tokens(model, tokens, "image")
    require_followed(model, tokens, image)
    if not image.any(1).all():
        raise EditError(
            f"prompt {int((~image.any(1)).nonzero()[0])} has no image; give only prompts with one"
        )
    lasts = [int(row.nonzero()[-1]) for row in tokens.mask.cpu()]
    if measure == "mass":
        record = model.record(tokens, statistics=(), keep=("qk",))
        rows = [
            torch.stack([record.pattern(layer, queries=last)[n, :, 0] for n, last in enumerate(lasts)])
            for layer in record.layers
        ]
        return torch.einsum("lbhk,bk->blh", torch.stack(rows).double().cpu(), image.double())
    seen = _at(model.head_outputs(tokens), lasts)
    with model.edit(*_hidden(tokens, image)):
        blind = _at(model.head_outputs(tokens), lasts)
    return (seen - blind).norm(dim=-1) / seen.norm(dim=-1)


def _hidden(tokens: Tokens, image: Tensor) -> list[Edit]:
    """What hides the image of each row from every token behind it."""
    found: list[Edit] = []
    for row, picked in enumerate(image):
        first = int(tokens.mask[row].long().argmax())
        inside = [n - first for n in picked.nonzero()[:, 0].tolist()]
        found.append(Knockout(queries=slice(inside[-1] + 1, None), keys=inside, rows=[row]))
    return found


def _at(outputs: Tensor, places: list[int]) -> Tensor:
    """z [batch, layer, head, d_value] at one place of each row, float64."""
    return torch.stack([outputs[n, :, :, place] for n, place in enumerate(places)]).double().cpu()
