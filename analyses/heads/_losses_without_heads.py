"""The loss after the ablation of chosen heads, for every layer in turn.

A head's output becomes zero, its mean over all texts, or its output in another text. Copies of a batch run together,
each with its own choice of heads. The blocks below the edited layer do not run again: `Resuming` hands back the outputs
that they had for the unedited batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Batch, Value, first_tokens, joined, queries_of, shape_of
from headwater.analyses._runs.resume_at_layer import Resuming
from headwater.kernels.edits.outputs import Gate, ReplaceOutput
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.context import ActiveEdit, Lowered
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.tokens import Tokens
from headwater.lens.progress import progress
from headwater.lens.running.forward import outputs_by_layer

TOKENS = 1024  # tokens of all copies that run together; their logits take the memory


@dataclass(frozen=True, eq=False)
class _Ablated(ActiveEdit):
    """An edit of one layer: replaces the outputs of `heads` (bool [row, head]) by `values`, or by zero without values.

    `values` is [text, head, position|1, d]. Copy c of text b is row c·texts + b: the kernels give row r the values of
    text r modulo the number of texts.
    """

    layer: int
    heads: Tensor
    values: Tensor | None

    def lower(self, layer: int, mask: Mask, batch: int) -> Lowered:
        if layer != self.layer:
            return Lowered()
        gone = Gate((~self.heads).float()) if self.values is None else ReplaceOutput(self.heads, self.values)
        return Lowered(outputs=(gone,))


def losses_without(
    model: HookedModel,
    batches: list[Batch],
    value: Value,
    heads: Tensor,
    ablation: Ablation,
    seed: int,
    what: str,
) -> tuple[Tensor, Tensor]:
    """The plain loss [text], and the loss after ablating `heads` of one layer [text, layer, choice]; both float64.

    `heads` is bool [choice, head]: each choice is ablated in each layer in turn. Active edits apply before it. Where
    `value` gives several numbers of each text, they are the last axis of both.
    """
    outputs = _Outputs(model, batches, ablation, seed)
    base = after = torch.zeros(0)
    steps = progress(total=len(batches) * model.n_layers, desc=what, unit="layer")
    with torch.no_grad(), steps:
        for batch in batches:
            resuming = Resuming.of(model, batch, value)
            if not len(base):
                shape = (len(outputs.texts), *resuming.base.shape[1:])
                base = torch.zeros(shape, dtype=torch.float64)
                after = base.new_zeros(shape[0], model.n_layers, len(heads), *shape[1:])
            base[batch.places] = resuming.base
            values = outputs.of(batch)
            for place, layer in enumerate(model.layers):
                instead = None if values is None else values[layer]
                start = resuming.start(layer)
                for choices, rows in _copies(model, batch, heads):
                    gone = heads[choices].repeat_interleave(len(queries_of(model, batch.ids)), 0)
                    edit = _Ablated(layer, gone, instead)
                    with resuming.before(start, len(choices)), model.acting([edit]):
                        found = value(rows).double().cpu().unflatten(0, (len(choices), -1))
                    after[torch.tensor(batch.places)[:, None], place, choices[None]] = found.transpose(0, 1)
                steps.update()
    return base, after


def _copies(model: HookedModel, batch: Batch, heads: Tensor) -> Iterator[tuple[Tensor, Batch]]:
    """Copies of the batch that run together, one per choice, and the indices of those choices."""
    fit = max(TOKENS // max(batch.ids.numel(), queries_of(model, batch.ids).numel()), 1)
    for choices in torch.arange(len(heads)).split(fit):
        yield choices, batch.copies(len(choices))


class _Outputs:
    """Values that replace the outputs of ablated heads, [text, head, position|1, d] by layer; None stands for zero."""

    def __init__(self, model: HookedModel, batches: list[Batch], ablation: Ablation, seed: int) -> None:
        self.model, self.ablation = model, ablation
        self.mean: dict[int, Tensor] | None = None
        self.texts = {place: batch.rows([n]) for batch in batches for n, place in enumerate(batch.places)}
        if ablation == "mean":
            tokens = sum(queries_of(model, batch.ids).numel() for batch in batches)
            self.mean = {layer: torch.zeros(()) for layer in model.layers}
            for batch in batches:
                for layer, z in outputs_by_layer(model, model.to_tokens(batch.ids), edited=False).items():
                    self.mean[layer] = self.mean[layer] + z.double().sum((0, 2))[None, :, None] / tokens
        if ablation == "resample":
            self.donors = self._drawn(seed)

    def of(self, batch: Batch) -> dict[int, Tensor] | None:
        if self.ablation == "zero":
            return None
        if self.mean is not None:
            return self.mean
        donors = [self.texts[self.donors[place]] for place in batch.places]
        if all(map(_can_be_cut, donors)):
            # the donor is cut before it runs; in a causal model its first outputs would be the same uncut
            donors = [first_tokens([donor], batch.ids.shape[1]) for donor in donors]
        return outputs_by_layer(self.model, self.model.to_tokens(joined(donors)), edited=False)

    def _drawn(self, seed: int) -> dict[int, int]:
        """For each text another one that is at least as long; for other examples one that is as long on every axis."""
        generator, drawn = torch.Generator().manual_seed(seed), {}
        for place in sorted(self.texts):
            own = self.texts[place]
            others = [n for n in sorted(self.texts) if n != place and self._can_stand_in(self.texts[n], own)]
            if not others:
                what = (
                    f"has the {own.shape[1]} tokens"
                    if _can_be_cut(own)
                    else "is as long on every axis as that"
                )
                raise AnalysisError(
                    f'ablation="resample": no other example {what} of example {place}; give one'
                )
            drawn[place] = others[int(torch.randint(len(others), (), generator=generator))]
        return drawn

    def _can_stand_in(self, other: Tensor, own: Tensor) -> bool:
        if _can_be_cut(own):
            return other.shape[1] >= own.shape[1]
        return shape_of(self.model, other) == shape_of(self.model, own)


def _can_be_cut(row: Tensor) -> bool:
    """Whether this is a text alone, whose first tokens are a text too."""
    return not isinstance(row, Tokens) or all(given.shape == row.shape for given in row.more.values())
