"""VHR: heads that see a picture are made stronger (He et al. 2025), and the divergence that finds them (VHD)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from headwater.lens.edits.base import Edit
from headwater.lens.edits.heads import ScaleHeads
from headwater.lens.errors import EditError
from headwater.lens.model import HookedModel
from headwater.lens.models.images import without_images
from headwater.lens.naming.heads import Head, Layers, chosen_layers
from headwater.lens.naming.tokens import Tokens


def head_reinforcement(
    model: HookedModel, prompt: Any, without: Any = None, *, alpha: float = 2.0, layers: Layers | None = None,
    in_turn: bool = False, **more: Any,
) -> list[Edit]:  # fmt: skip
    """VHR (He et al. 2025): scale by `alpha` the heads whose output changes most when the image is removed.

    VHD = |z(prompt) - z(without)|₂ per head, at the last token. It counts as 0 if both VHD and |z(without)|² are
    outliers, above mean + std of their layer (population std over heads). The heads above the median of their layer are
    scaled. `without` is the prompt without its picture; by default the same prompt, whose image tokens are left out.
    `more` (the image) is given to `prompt` only. `layers` defaults to the second and the last 14 of 32, in proportion.
    The heads are chosen once, on this prompt, and stay for what is generated. `in_turn` goes layer by layer: a layer is
    measured with the chosen heads below it scaled already, in both runs, which takes two runs for each layer. Checked
    against the text.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("llava"))  # random weights
    >>> prompt = zoo.inputs("llava", lengths=(11,))  # input_ids, attention_mask, pixel_values
    >>> (edit,) = hw.recipes.head_reinforcement(model, prompt["input_ids"], pixel_values=prompt["pixel_values"])
    >>> len(edit.factors)  # half of the 4 heads of layer 1
    2
    """
    if layers is None:
        layers = sorted({*model.layers[1:2], *model.layers[-max(round(model.n_layers * 14 / 32), 1) :]})
    wanted = chosen_layers(layers, model.layers)
    seen = _one(model.to_tokens(prompt, **more))
    blind = without_images(model, seen) if without is None else _one(model.to_tokens(without))
    factors: dict[str | Head, float] = {}
    for some in [[layer] for layer in wanted] if in_turn else [wanted]:
        with model.edit(*[ScaleHeads(dict(factors))] if factors else []):
            divergence, outlier = head_divergence(*(_last(model, each, in_turn) for each in (seen, blind)))
        chosen = above_median(divergence.masked_fill(outlier, 0.0))
        found = [Head(model.layers[i], h) for i, h in chosen.nonzero().tolist()]
        factors |= {str(head): alpha for head in found if head.layer in some}
    return [ScaleHeads(factors)]


def head_divergence(
    seen: Float[Tensor, "*layer head d"], blind: Float[Tensor, "*layer head d"]
) -> tuple[Float[Tensor, "*layer head"], Bool[Tensor, "*layer head"]]:
    """VHD of each head, and which heads are outliers: VHD and |blind|² both above mean + std over the layer's heads."""
    divergence = (seen - blind).norm(dim=-1)
    return divergence, _far(divergence) & _far(blind.square().sum(-1))


def above_median(score: Float[Tensor, "*layer head"]) -> Bool[Tensor, "*layer head"]:
    return score > score.quantile(0.5, dim=-1, keepdim=True)


def _far(values: Tensor) -> Tensor:
    """More than a (population) standard deviation above the mean of the layer."""
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True, correction=0)


def _one(tokens: Tokens) -> Tokens:
    if len(tokens) != 1:
        raise EditError(f"head_reinforcement compares one prompt with one; got {len(tokens)}")
    return tokens


def _last(model: HookedModel, tokens: Tokens, edited: bool) -> Float[Tensor, "layer head d_value"]:
    """z of every head at the last token of one prompt, float64."""
    end = int(tokens.mask[0].nonzero()[-1])
    return model.head_outputs(tokens, edited=edited)[0, :, :, end].double().cpu()
