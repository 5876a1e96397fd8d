"""Vectors that change the outputs of heads: Adam trains them on a loss, and the weights of the model are frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    one_each,
)
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.running.forward import next_token_loss

START = 1e-3  # standard deviation of the vectors before the first step
Change = Callable[[Tensor, Tensor], Tensor]  # (z of a layer [batch, position, head, d_head], its vectors) → z


@dataclass(frozen=True, eq=False)
class Objective:
    """Batches of examples, and the mean loss of a batch when vectors [layer, head, d_head] change the outputs z."""

    model: HookedModel
    batches: list[Batch]
    value: Callable[[Batch, Tensor], Tensor]
    change: Change

    @classmethod
    def of(
        cls, change: Change, model: HookedModel, examples: Examples, loss: Loss | None, answer: Answer | None,
        position: int, size: int,
    ) -> Objective:  # fmt: skip
        if not (model.has_lm_head and model.causal):
            raise AnalysisError(
                f"{model.name} is not a causal language model; its heads are not trained here"
            )
        if loss is not None and answer is not None:
            raise AnalysisError("loss and answer ask for different things; give one of them")
        batches = batches_of(model, examples, size)
        if answer is not None:
            explained = Explained(model, None, answer, None, position, "log_probability")
            known = {batch.places[0]: explained.of(batch) for batch in batches}

            def of_answer(batch: Batch, logits: Tensor) -> Tensor:
                return -known[batch.places[0]](logits, torch.arange(len(batch.ids))).mean()

            return cls(model, batches, of_answer, change)
        if loss is None and batches[0].ids.shape[1] < 2:  # shorter texts come first
            raise AnalysisError(f"example {batches[0].places[0]} has one token; give an answer or a loss")

        def of_loss(batch: Batch, logits: Tensor) -> Tensor:
            found = loss(logits, batch.ids) if loss else next_token_loss(logits, model.to_tokens(batch.ids))
            return one_each(found, len(batch.ids), "loss", "example").mean()

        return cls(model, batches, of_loss, change)

    def of_batch(self, batch: Batch, vectors: Tensor, *, grad: bool) -> Tensor:
        def changed(z: Tensor, hook: Any, mine: Tensor) -> Tensor:
            return self.change(z, mine.to(z))

        layers = zip(self.model.layers, vectors, strict=True)
        hooks: list[Any] = [(f"blocks.{n}.attn.hook_z", partial(changed, mine=v)) for n, v in layers]
        return self.value(batch, self.model.run_with_hooks(batch.ids, hooks, grad=grad))

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
