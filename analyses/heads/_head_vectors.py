"""Vectors on the outputs of heads, trained by Adam with everything else frozen, and the loss they are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.analyses._measures.measure import Answer, Explained
from headwater.analyses._prompts.examples import Batch, Examples, Loss, batches_of, drawn_in_turn, one_each
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.running.forward import next_token_loss

START = 1e-3  # standard deviation of the vectors before the first step
Change = Callable[[Tensor, Tensor], Tensor]  # (z of a layer [batch, position, head, d_head], its vectors) → z


@dataclass(frozen=True, eq=False)
class Objective:
    """Batches of examples and the mean loss of one, of a run in which vectors [layer, head, d_head] change z."""

    model: HookedModel
    batches: list[Batch]
    value: Callable[[Batch, Tensor], Tensor]

    @classmethod
    def of(
        cls, model: HookedModel, examples: Examples, loss: Loss | None, answer: Answer | None, position: int, size: int
    ) -> Objective:  # fmt: skip
        if not (model.has_lm_head and model.causal):
            raise AnalysisError(
                f"{model.name} is not a causal language model; its heads are not trained here"
            )
        if loss is not None and answer is not None:
            raise AnalysisError("loss and answer ask for different things; give one of them")
        batches = batches_of(model, examples, size)
        if answer is None:
            for batch in batches if loss is None else []:
                if batch.ids.shape[1] < 2:
                    raise AnalysisError(f"example {batch.places[0]} has one token; give an answer or a loss")
            return cls(model, batches, lambda batch, logits: _mean_loss(model, loss, batch, logits))
        explained = Explained(model, None, answer, None, position, "log_probability")
        known = {batch.places[0]: explained.of(batch) for batch in batches}
        return cls(
            model, batches, lambda b, logits: -known[b.places[0]](logits, torch.arange(len(b.ids))).mean()
        )

    def of_batch(self, batch: Batch, vectors: Tensor, change: Change, *, grad: bool) -> Tensor:
        model = self.model

        def function(layer: int) -> Callable[..., Tensor]:
            mine = vectors[model.layers.index(layer)]
            return lambda z, hook: change(z, mine.to(z))

        hooks: list[Any] = [(f"blocks.{layer}.attn.hook_z", function(layer)) for layer in model.layers]
        logits = model.run_with_hooks(batch.ids, hooks, grad=grad)
        return self.value(batch, logits)

    def whole(self, vectors: Tensor, change: Change) -> float:
        """The loss of all examples, each counting alike."""
        with torch.no_grad():
            sums = [float(self.of_batch(b, vectors, change, grad=False)) * len(b.ids) for b in self.batches]
        return sum(sums) / sum(len(b.ids) for b in self.batches)


def _mean_loss(model: HookedModel, loss: Loss | None, batch: Batch, logits: Tensor) -> Tensor:
    found = next_token_loss(logits, model.to_tokens(batch.ids)) if loss is None else loss(logits, batch.ids)
    return one_each(found, len(batch.ids), "loss", "example").mean()


def trained(
    objective: Objective, change: Change, chosen: Tensor, penalty: float, steps: int, rate: float, seed: int
) -> tuple[Tensor, list[float]]:
    """Vectors [layer, head, d_head], 0 but in `chosen` heads (bool [layer, head]), and the loss at each step.

    Adam on `loss + penalty·Σ|vector|`, one batch a step, the order of batches drawn anew whenever all had their turn.
    """
    model, generator = objective.model, torch.Generator().manual_seed(seed)
    shape = (model.n_layers, model.n_heads, model.d_head)
    mask = chosen[..., None].float()
    vectors = (START * torch.randn(shape, generator=generator) * mask).requires_grad_()
    adam = torch.optim.Adam([vectors], lr=rate)
    history = []
    for batch in drawn_in_turn(objective.batches, steps, generator, "training"):
        with torch.enable_grad():
            loss = objective.of_batch(batch, vectors * mask, change, grad=True)
            (slope,) = torch.autograd.grad(loss + penalty * vectors.abs().sum().to(loss), vectors)
        vectors.grad = slope * mask
        adam.step()
        history.append(float(loss.detach()))
    return vectors.detach() * mask, history
