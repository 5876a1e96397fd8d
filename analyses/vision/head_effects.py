"""Head effects: what a model says of a picture when a head is removed, and when it alone stays in its layer.

Li et al. 2023 (arXiv 2303.13731) measure a head of a vision transformer by pruning it, in both directions and by four
numbers, over all pictures and for each class. The runs are those of all_but_one and head_importance.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Draws, Seed
from headwater.analyses._measures.bootstrap import finite_mean, intervals
from headwater.analyses._prompts.examples import Batch, Examples, as_tokens, batches_of, whole_of
from headwater.analyses.heads._losses_without_heads import losses_without
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import inputs
from headwater.lens.models.classes import logits_of
from headwater.lens.running.forward import forward

MEASURES = ("probability", "accuracy", "divergence", "state")
WAYS = ("removed", "alone")


@analysis
def head_effects(
    model: HookedModel,
    examples: Examples,
    draws: Draws = 1000,
    batch_size: BatchSize = 16,
    by_class: Annotated[bool, "add the means over the pictures of each class"] = False,
    seed: Seed = 0,
) -> xr.Dataset:
    """`effect`, `low` and `high` (95 %, bootstrap over pictures), [measure, way, layer, head].

    Way "removed": the head's output is zero. Way "alone": that of every other head of its layer is. With p and q the
    distributions over classes before and after, y the class, c and d the class token of `model.embeddings` before and
    after, the measures are `probability` = p_y - q_y; `accuracy` = [argmax p = y] - [argmax q = y]; `divergence`, the
    Jensen–Shannon divergence of p and q; `state` = 1 - cos(c, d). All are 0 where nothing changes, and large where a
    removed head matters; "alone" they are small where the head does the layer's work by itself. `per_example` has them
    for each picture; `of_class` [class, measure, way, layer, head] with `by_class`, NaN where no picture has the class.

    y is the `label` of each example, or without labels what the model says (attribute `classes`: "given" or
    "predicted"). A model without classes has `state` alone. Without a class token the state is the mean of all tokens.
    `chance` is the accuracy of a guess.

    Question: What does a model no longer see without a head, or with that head alone?
    Unit: probability and accuracy: shares; divergence: nats, at most ln 2; state: 0 to 2.
    Source: Li et al. 2023, arXiv:2303.13731; formulas from memory.
    Cost: 2 × layers × heads passes per batch, many at once, each starting at its layer.
    Not for: heads that back each other up: one at a time is removed; see prune_heads.

    >>> import headwater as hw, torch, transformers
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    >>> config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    >>> model = hw.load(transformers.ViTForImageClassification(config).eval())
    >>> found = hw.analyses.head_effects(model, torch.randn(3, 3, 16, 16), draws=10)
    >>> dict(found.effect.sizes)
    {'measure': 4, 'way': 2, 'layer': 2, 'head': 2}
    """
    part = model.parts[model.part_name]
    if part.queries != "image" or part.crosses:
        towers = [name for name, other in model.parts.items() if other.queries == "image"]
        mend = (
            f"read its tower: model.part({towers[0]!r})" if towers else "see head_importance and all_but_one"
        )
        raise AnalysisError(f"{model.name} is read as its {model.part_name}, which sees no pictures; {mend}")
    own = torch.eye(model.n_heads, dtype=torch.bool)
    classes, measures = len(model.classes), MEASURES if model.classes else MEASURES[-1:]
    batches = batches_of(model, examples, batch_size)
    rows: dict[int, np.ndarray] = {}
    labels: dict[int, int] = {}
    labelled = True
    for batch in batches:
        alone = replace(batch, places=list(range(len(batch.ids))))
        value = _Seen(model)
        base, after = losses_without(
            model, [alone], value, torch.cat([own, ~own]), "zero", seed, "head effects"
        )
        given = as_tokens(batch.ids).labels
        labelled = labelled and given is not None
        y = base[:, :classes].argmax(-1) if given is None and classes else given
        found = _measured(base, after.unflatten(2, (len(WAYS), -1)), classes, y)
        rows |= dict(zip(batch.places, found.numpy(), strict=True))
        if y is not None:
            labels |= dict(zip(batch.places, y.tolist(), strict=True))
    table = np.stack([rows[place] for place in sorted(rows)])
    dims = ("measure", "way", "layer", "head")
    result = xr.Dataset(
        {**intervals(table, dims, draws, seed, ("effect", "low", "high")), "per_example": (("batch", *dims), table)},
        coords={
            "measure": list(measures), "way": list(WAYS), "layer": model.layers, "head": np.arange(model.n_heads),
            "batch": np.arange(len(table)),
        },
        attrs={"examples": len(table)},
    )  # fmt: skip
    if not classes:
        return result
    y = np.array([labels[place] for place in sorted(labels)])
    result = result.assign(label=("batch", y))
    result.attrs |= {"classes": "given" if labelled else "predicted", "chance": 1 / classes}
    if by_class:
        means = np.stack([finite_mean(table[y == c], 0) for c in range(classes)])
        result = result.assign(of_class=(("class", *dims), means)).assign_coords(
            {"class": list(model.classes)}
        )
    return result


class _Seen:
    """The probabilities of the classes and the last state of the class token, [row, class + feature], in float64."""

    def __init__(self, model: HookedModel) -> None:
        self.model, self.whole = model, whole_of(model)

    def __call__(self, batch: Batch) -> Tensor:
        out = forward(self.whole, self.model.to_tokens(batch.ids), output_hidden_states=True)
        states = inputs.last_hidden(out, self.model.part_name).double()
        patches = self.model.parts[self.model.part_name].patches
        state = states[:, 0] if patches is not None and patches.prefix else states.mean(1)
        logits = logits_of(out) if self.model.classes else None
        return state if logits is None else torch.cat([logits.double().softmax(-1), state], -1)


def _measured(base: Tensor, after: Tensor, classes: int, y: Tensor | None) -> Tensor:
    """The measures, [picture, measure, way, layer, head]; `base` is [picture, number], `after` [picture, layer, way,
    head, number]."""
    base = base[:, None, None, None].expand_as(after)
    p, c = base.split([classes, base.shape[-1] - classes], -1)
    q, d = after.split([classes, base.shape[-1] - classes], -1)
    found = [1 - torch.nn.functional.cosine_similarity(c, d, -1)]
    if y is not None:
        pick = y.long().view(-1, 1, 1, 1, 1).expand(*p.shape[:-1], 1)
        right = [(x.argmax(-1, keepdim=True) == pick).double().squeeze(-1) for x in (p, q)]
        mean = torch.special.entr((p + q) / 2).sum(-1)
        divergence = mean - (torch.special.entr(p).sum(-1) + torch.special.entr(q).sum(-1)) / 2
        found = [(p - q).gather(-1, pick).squeeze(-1), right[0] - right[1], divergence.clamp_min(0), *found]
    return torch.stack(found, 1).transpose(2, 3)
