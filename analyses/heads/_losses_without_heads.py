"""The loss without chosen heads of each layer: copies of the texts run together, one choice of heads for each.

What takes a head's place is nothing, its mean output over all texts, or its output in another text. The blocks below
the edited layer have nothing to do again: they hand back what they gave for the texts as they are (`_resuming`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from headwater.analyses._prompts.examples import Batch, Value
from headwater.analyses._runs.resume_at_layer import Resuming
from headwater.kernels.edits.outputs import Gate, ReplaceOutput
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context
from headwater.lens.attention.context import ActiveEdit, Lowered
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

TOKENS = 1024  # tokens of all copies that run together: their logits are the memory it takes


@dataclass(frozen=True, eq=False)
class _Ablated(ActiveEdit):
    """An edit of one layer: `heads` bool [row, head] give way to `values` [text, head, position|1, d], or to nothing.

    Copy c of text b is row c·texts + b, so that the kernels' rule (row r takes sample r modulo their number) holds.
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
    """Loss of the texts as they are [text], and without `heads` (bool [choice, head], tried in every layer by itself)
    [text, layer, choice]; both float64. Edits that are on come first."""
    count = sum(len(batch.places) for batch in batches)
    base = torch.zeros(count, dtype=torch.float64)
    after = torch.zeros(count, model.n_layers, len(heads), dtype=torch.float64)
    outputs = _Outputs(model, batches, ablation, seed)
    steps = tqdm(total=len(batches) * model.n_layers, desc=what, unit="layer", disable=None)
    with torch.no_grad(), steps:
        for batch in batches:
            resuming = Resuming.of(model, batch, value)
            base[batch.places] = resuming.base
            values = outputs.of(batch)
            for place, layer in enumerate(model.layers):
                instead = None if values is None else values[:, place]
                for choices, rows in _copies(batch, heads):
                    gone = heads[choices].repeat_interleave(len(batch.places), 0)
                    edit = _Ablated(layer, gone, instead)
                    with resuming.before(layer, len(choices)), context.editing(model.key, [edit]):
                        found = value(rows).double().cpu().view(len(choices), -1)
                    after[torch.tensor(batch.places)[:, None], place, choices[None]] = found.T
                steps.update()
    return base, after


def check_ablation(ablation: str, batches: list[Batch]) -> None:
    """Refuse a way of ablation that lacks texts to take outputs from."""
    if ablation == "resample" and sum(len(batch.places) for batch in batches) < 2:
        raise AnalysisError(
            'ablation="resample" needs two or more examples, to take outputs from another one'
        )


def _copies(batch: Batch, heads: Tensor) -> Iterator[tuple[Tensor, Batch]]:
    """As many copies of the batch as run together: the choices they stand for, and the copies."""
    fit = max(TOKENS // batch.ids.numel(), 1)
    for choices in torch.arange(len(heads)).split(fit):
        yield choices, Batch(batch.ids.repeat(len(choices), 1), batch.places * len(choices))


class _Outputs:
    """What takes the place of ablated heads in a batch, [text, layer, head, position|1, d]; None for nothing."""

    def __init__(self, model: HookedModel, batches: list[Batch], ablation: Ablation, seed: int) -> None:
        self.model, self.ablation = model, ablation
        self.mean: Tensor | None = None
        self.texts = {p: ids for batch in batches for p, ids in zip(batch.places, batch.ids, strict=True)}
        if ablation == "mean":
            sums = [model.head_outputs(batch.ids, edited=False).double().sum((0, 3)) for batch in batches]
            tokens = sum(batch.ids.numel() for batch in batches)
            self.mean = (torch.stack(sums).sum(0) / tokens)[None, :, :, None]
        if ablation == "resample":
            self.donors = self._drawn(torch.Generator().manual_seed(seed))

    def of(self, batch: Batch) -> Tensor | None:
        if self.ablation == "zero":
            return None
        if self.mean is not None:
            return self.mean
        length = batch.ids.shape[1]
        donors = torch.stack([self.texts[self.donors[place]][:length] for place in batch.places])
        # a causal model does the same with the beginning of a text; in another the donor is cut before it is read
        return self.model.head_outputs(donors, edited=False)

    def _drawn(self, generator: torch.Generator) -> dict[int, int]:
        """Another text for each, at least as long."""
        drawn = {}
        for place in sorted(self.texts):
            own = len(self.texts[place])
            others = [n for n in sorted(self.texts) if n != place and len(self.texts[n]) >= own]
            if not others:
                raise AnalysisError(
                    f'ablation="resample": no other example has the {own} tokens of example {place}; give one'
                )
            drawn[place] = others[int(torch.randint(len(others), (), generator=generator))]
        return drawn
