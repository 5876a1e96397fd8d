"""Vectors that change the outputs of heads: Adam trains them on a loss, and the weights of the model are frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._measures.measure import Answer, Explained
from headwater.analyses._prompts.examples import (
    Batch,
    Examples,
    Loss,
    batches_of,
    differentiable,
    drawn_in_turn,
    loss_of,
    outputs_of,
)
from headwater.lens.attention import context
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

START = 1e-3  # standard deviation of the vectors before the first step
Change = Callable[[Tensor, Tensor], Tensor]  # (z of a layer [batch, position, head, d_head], its vectors) → z


class _Changed(context.Tap):
    """Changes the outputs z of every head by the vectors of its layer, where edits of heads act."""

    def __init__(self, change: Change, vectors: dict[int, Tensor]) -> None:
        self.change, self.vectors = change, vectors

    def leaving(self, layer: int, z: Tensor) -> Tensor:
        return self.change(z.transpose(1, 2), self.vectors[layer].to(z)).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Objective:
    """Batches of examples, and the loss of each example of a batch (with gradients or without), while vectors
    [layer, head, d_head] change the outputs z."""

    model: HookedModel
    batches: list[Batch]
    value: Callable[[Batch, bool], Tensor]
    change: Change

    @classmethod
    def of(
        cls, change: Change, model: HookedModel, examples: Examples, loss: Loss | None, answer: Answer | None,
        position: int, size: int,
    ) -> Objective:  # fmt: skip
        if loss is not None and answer is not None:
            raise AnalysisError("loss and answer ask for different things; give one of them")
        batches = batches_of(model, examples, size)
        if answer is None:
            return cls(model, batches, lambda batch, grad: loss_of(model, loss, grad)(batch), change)
        explained = Explained(model, None, answer, None, position, "log_probability", of_classes=True)
        known = {batch.places[0]: explained.of(batch) for batch in batches}
        outputs = outputs_of(model)

        def of_answer(batch: Batch, grad: bool) -> Tensor:
            logits = outputs(batch.ids, grad=grad)
            return -known[batch.places[0]](logits, torch.arange(len(batch.ids)))

        return cls(model, batches, of_answer, change)

    def of_batch(self, batch: Batch, vectors: Tensor, *, grad: bool) -> Tensor:
        tap = _Changed(self.change, dict(zip(self.model.layers, vectors, strict=True)))
        with context.tapping(self.model.key, tap):
            return self.value(batch, grad).mean()

    def whole(self, vectors: Tensor) -> float:
        """The mean loss over all examples."""
        with torch.no_grad():
            sums = [float(self.of_batch(b, vectors, grad=False)) * len(b.ids) for b in self.batches]
        return sum(sums) / sum(len(b.ids) for b in self.batches)

    def trained(
        self, name: str, chosen: Tensor, penalty: float, steps: int, rate: float, seed: int
    ) -> xr.Dataset:
        """Adam on `loss + penalty·Σ|vector|`, one batch a step; all batches take turns in a newly drawn order.

        Dataset: `name` [layer, head, feature], the vectors, 0 outside of the `chosen` heads (bool [layer, head]);
        `training_loss` [step]; `loss_before` and `loss_after`, the means over all examples.
        """
        model, generator = self.model, torch.Generator().manual_seed(seed)
        shape = (model.n_layers, model.n_heads, model.d_value)
        mask = chosen[..., None].float()
        vectors = (START * torch.randn(shape, generator=generator) * mask).requires_grad_()
        adam = torch.optim.Adam([vectors], lr=rate)
        history = []
        for batch in drawn_in_turn(self.batches, steps, generator, "training"):
            with torch.enable_grad():
                loss = differentiable(self.of_batch(batch, vectors * mask, grad=True), "the loss")
                (slope,) = torch.autograd.grad(loss + penalty * vectors.abs().sum().to(loss), vectors)
            vectors.grad = slope * mask
            adam.step()
            history.append(float(loss.detach()))
        final = vectors.detach() * mask
        return xr.Dataset(
            {
                name: (("layer", "head", "feature"), final.numpy()),
                "training_loss": ("step", np.array(history)),
                "loss_before": self.whole(torch.zeros_like(final)),
                "loss_after": self.whole(final),
            },
            coords={"layer": model.layers, "head": np.arange(model.n_heads)},
        )
