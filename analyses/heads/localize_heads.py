"""Localised heads: which heads would a task rather have louder or quieter, coordinate by coordinate?

The first step of LoFiT (Yin, Ye & Durrett, NeurIPS 2024, arXiv 2406.01563): a scale per coordinate of every head's
output is trained on the task with a price on its size, and heads are ranked by the length of theirs. `fit_offsets` is
the second step. The weights of the model stay as they are.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.measure import AnswerSetting, PositionSetting
from headwater.analyses._prompts.examples import Examples, Loss
from headwater.analyses.heads._head_vectors import Objective, trained
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head


@analysis
def localize_heads(
    model: HookedModel,
    examples: Examples,
    loss: Loss | None = None,
    answer: AnswerSetting = None,
    position: PositionSetting = -1,
    penalty: Annotated[float, "price of the scales' absolute values", Bounds(0.0)] = 5e-4,
    steps: Annotated[int, "steps of Adam, each on one batch", Bounds(1)] = 50,
    rate: Annotated[float, "learning rate", Bounds(0.0)] = 5e-3,
    batch_size: Annotated[int, "examples of equal length that run together", Bounds(1)] = 8,
    seed: Annotated[int, "seed of the start and of the order of batches", Bounds(0)] = 0,
) -> xr.Dataset:
    """Train A in `z' = (1 + A_lh) ⊙ z` on `loss + penalty·Σ|A|` and score heads by `‖A_lh‖₂`.

    The loss is that of the next tokens, minus the log-probability of `answer` at `position` (one per text), or
    `loss(logits, tokens) → [batch]`. A begins at N(0, 1e-3). Dataset: `score` [layer, head], `scale`
    [layer, head, feature] (A), `training_loss` [step], `loss_before` and `loss_after` over all examples.
    The published settings are 5 epochs in batches of 8, rate 5e-3 and penalty 5e-4 for 7 billion parameters, and the
    best 32 of 1024 heads. `most_moved(result, k)` names the heads.
    Unit: length; nats. Source: the authors' code, checked.

    Question: Which heads does learning a task change most?
    Unit: length of the trained scale of a head; loss in nats with the default loss.
    Source: Yin, Ye & Durrett 2024, arXiv:2406.01563.
    Cost: `steps` forward and backward passes over a batch.
    Not for: which heads the model uses as it is (head_importance); a ranking without random heads beside it.
    """
    objective = Objective.of(model, examples, loss, answer, position, batch_size)
    everyone = torch.ones(model.n_layers, model.n_heads, dtype=torch.bool)
    scale, history = trained(objective, scaled, everyone, penalty, steps, rate, seed)
    return xr.Dataset(
        {
            "score": (("layer", "head"), scale.norm(dim=-1).numpy()),
            "scale": (("layer", "head", "feature"), scale.numpy()),
            "training_loss": ("step", np.array(history)),
            "loss_before": objective.whole(torch.zeros_like(scale), scaled),
            "loss_after": objective.whole(scale, scaled),
        },
        coords={"layer": model.layers, "head": np.arange(model.n_heads)},
    )


def scaled(z: Tensor, vectors: Tensor) -> Tensor:
    """z [batch, position, head, d_head] with every coordinate louder by its vector's share."""
    return z * (1 + vectors)


def most_moved(found: xr.Dataset, count: int) -> list[Head]:
    """The `count` heads of the largest scores, largest first."""
    scores = found["score"]
    if count > scores.size:
        raise AnalysisError(f"count={count}, but there are {scores.size} heads; give 1 to {scores.size}")
    order = np.argsort(-scores.values.ravel(), kind="stable")[:count]
    layers = found["layer"].values
    return [Head(int(layers[n // scores.shape[1]]), int(n % scores.shape[1])) for n in order]
