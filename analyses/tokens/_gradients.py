"""Gradients of the explained number s with respect to every attention weight, without storing them.

For a head's output `z = A v` the gradient is `∂s/∂A_ij = (∂s/∂z_i)·v_j`. One backward pass keeps ∂s/∂z, O(S·d) numbers
per head; blocks of rows of ∂s/∂A are multiplied out when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.analyses._inputs.inputs import Value
from headwater.analyses._measures.measure import Explained
from headwater.analyses._prompts.examples import Batch, differentiable, outputs_of
from headwater.analyses._prompts.positions import place_of
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.signature import compares
from headwater.lens.running.watching import Heads


@dataclass(frozen=True, eq=False)
class WeightSlopes:
    """One layer's attention map with the two factors of its weights' gradient.

    `slope` is ∂s/∂z [batch, head, query, d], `value` the values [batch, head, key, d], one per query head.
    """

    map: AttentionMap
    slope: Tensor
    value: Tensor

    def row_blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of rows: their weights and the gradient of these, both [batch, head, row, key] in float64."""
        for rows, weights in self.map.row_blocks():
            yield rows, weights.double(), self.slope[:, :, rows] @ self.value.mT

    def relevant_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows of `mean_h relu(∂s/∂A ⊙ A)`, [batch, row, key]."""
        for rows, weights, slopes in self.row_blocks():
            yield rows, (weights * slopes).clamp_min(0).mean(1)

    def pulled(self, rows: Tensor) -> Tensor:
        """`rows @ Ā` with `Ā = mean_h relu(∂s/∂A ⊙ A)`, for rows [batch, asked, query]: [batch, asked, key]."""
        out = rows.new_zeros(*rows.shape[:-1], self.value.shape[2])
        for span, block in self.relevant_blocks():
            out += rows[..., span] @ block
        return out

    def pushed(self, columns: Tensor) -> Tensor:
        """`Ā @ columns` for columns [batch, key, asked]: [batch, query, asked]."""
        return torch.cat([block @ columns for _, block in self.relevant_blocks()], 1)


def weight_slopes(model: HookedModel, batch: Batch, value: Value) -> dict[int, WeightSlopes]:
    """Gradient factors of the explained number by layer, from one forward and one backward pass."""
    return slopes_of_run(
        model, lambda: value(outputs_of(model)(batch.ids, grad=True), torch.arange(len(batch.ids)))
    )


def slopes_of_run(model: HookedModel, run: Callable[[], Tensor]) -> dict[int, WeightSlopes]:
    """The same of the sum of what `run` gives: one run of the model with gradients, and a number for each example."""
    listener = Heads(model)
    with context.listening(listener), context.tapping(model.key, Rooted()):
        found = run()
    kept = {layer: listener.layers[layer] for layer in model.layers}
    found = differentiable(found, "the measure")
    slopes = torch.autograd.grad(found.sum(), [output for _, _, output in kept.values()], allow_unused=True)
    return {
        layer: slopes_at(model, layer, heads, slope)
        for (layer, heads), slope in zip(kept.items(), slopes, strict=True)
    }


class Rooted(context.Tap):
    """Starts the gradient at the first head outputs, so that no embedding, feature or weight needs `requires_grad`."""

    def leaving(self, layer: int, z: Tensor) -> Tensor:
        return z if z.requires_grad or not torch.is_grad_enabled() else z.detach().requires_grad_()


def slopes_at(
    model: HookedModel, layer: int, heads: tuple[AttentionMap, Tensor, Tensor], slope: Tensor | None
) -> WeightSlopes:
    """One layer's gradient factors, from what `Heads` kept of it and ∂s/∂z there; None is a gradient of zero."""
    map, values, output = heads
    slope = torch.zeros_like(output) if slope is None else slope
    slope = _through_edits(model, layer, map.rule.mask, slope)
    group = slope.shape[1] // values.shape[1]
    return WeightSlopes(map, slope.double(), values.repeat_interleave(group, 1).double())


def predicting(asked: Explained, batches: Sequence[Batch]) -> int:
    """The position whose row explains the prediction: the one that is asked about, or the one at which the outputs read
    this part.

    What the last attention layer writes at a position reaches the outputs only if they read it there. AnalysisError
    where they read several positions, or another one in each text.
    """
    model = asked.model
    tokens = model.parts[model.part_name].queries in ("text", "decoder") and not compares(model.hf)
    if tokens and (asked.measure is not None or not model.classes):
        for batch in batches:
            place_of(asked.position, batch.ids.shape[1], f"example {batch.places[0]}")
        return asked.position
    what = "classes" if model.classes else "outputs"
    found: list[tuple[int, int]] = []
    for batch in batches:
        read = _read_at(weight_slopes(model, batch, asked.of(batch)))
        if not (read.sum(-1) == 1).all():
            raise AnalysisError(
                f"{model.name} reads its {what} at {int(read.sum(-1).max())} positions of the {model.part_name}; name "
                "the rows to read out, e.g. queries=[0]"
            )
        found += [(place, place - read.shape[1]) for place in read.long().argmax(-1).tolist()]
    for places in zip(*found, strict=True):
        if len(set(places)) == 1:
            return places[0]
    raise AnalysisError(
        f"{model.name} reads its {what} at another position in each text; give the texts one by one"
    )


def _read_at(slopes: Mapping[int, WeightSlopes]) -> Tensor:
    """Where the last layer that the outputs depend on is read, bool [text, query]."""
    read = torch.zeros(0)
    for layer in sorted(slopes, reverse=True):
        read = (slopes[layer].slope != 0).any(-1).any(1)
        if read.any():
            break
    return read


def _through_edits(model: HookedModel, layer: int, mask: Mask, slope: Tensor) -> Tensor:
    """The gradient at A v from that behind the edits of head outputs. Those edits are linear in A v."""
    edits = [
        edit
        for prepared in context.active(model.key)
        for edit in prepared.lower(layer, mask, len(slope)).outputs
    ]
    if not edits:
        return slope
    with torch.enable_grad():
        before = torch.zeros_like(slope, requires_grad=True)
        after = before
        for edit in edits:
            after = edit.apply(after, torch.arange(mask.queries)[None])
        if not after.requires_grad:
            return torch.zeros_like(slope)
        return torch.autograd.grad(after, before, slope)[0]
