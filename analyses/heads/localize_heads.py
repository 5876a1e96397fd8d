"""Localised heads: the heads whose outputs a task scales most.

The first step of LoFiT (Yin, Ye & Durrett, NeurIPS 2024, arXiv 2406.01563): Adam trains one scale per coordinate of
every head's output, with an L1 penalty, and the norm of its scale ranks each head. `fit_offsets` is the second step.
The weights of the model do not change.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds
from headwater.analyses._measures.measure import AnswerSetting, PositionSetting
from headwater.analyses._prompts.examples import Examples, Loss
from headwater.analyses.heads._head_vectors import Objective
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
    penalty: Annotated[float, "penalty on the scales' absolute values", Bounds(0.0)] = 5e-4,
    steps: Annotated[int, "steps of Adam, each on one batch", Bounds(1)] = 50,
    rate: Annotated[float, "learning rate", Bounds(0.0)] = 5e-3,
    batch_size: BatchSize = 8,
    seed: Annotated[int, "seed of the start and of the order of batches", Bounds(0)] = 0,
) -> xr.Dataset:
    """Train A in `z' = (1 + A_lh) ⊙ z` on `loss + penalty·Σ|A|` and score heads by `‖A_lh‖₂`.

    The loss is that of `model.loss`, minus the log-probability of `answer` (a token at `position`, or a class), or
    `loss(outputs, tokens) → [batch]`. With `model.part(name)` the heads are those of the part. A starts at N(0, 1e-3).
    Dataset: `score` [layer, head]; `scale` [layer, head, feature], which is A; `training_loss` [step]; `loss_before`
    and `loss_after`, means over all examples. `most_moved(result, k)` lists the best k heads. The paper trains a model
    of 7 billion parameters for 5 epochs in batches of 8, with rate 5e-3 and penalty 5e-4, and keeps 32 of 1024 heads.

    Question: Which heads does learning a task change most?
    Unit: length of the trained scale of a head; loss in nats with the default loss.
    Source: Yin, Ye & Durrett 2024, arXiv:2406.01563; held to the authors' code.
    Cost: `steps` forward and backward passes over a batch.
    Not for: which heads the model uses as it is (head_importance); a ranking without random heads beside it.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> texts = ["When Mary and John went to the store , John gave a drink to"]
    >>> found = hw.analyses.localize_heads(model, texts, answer="Mary", steps=3)
    >>> found.score.shape, bool(found.loss_after < found.loss_before)
    ((4, 8), True)
    """
    objective = Objective.of(scaled, model, examples, loss, answer, position, batch_size)
    everyone = torch.ones(model.n_layers, model.n_heads, dtype=torch.bool)
    found = objective.trained("scale", everyone, penalty, steps, rate, seed)
    score = torch.from_numpy(found["scale"].values).norm(dim=-1)
    return found.assign(score=(("layer", "head"), score.numpy()))[["score", *found]]


def scaled(z: Tensor, vectors: Tensor) -> Tensor:
    """z [batch, position, head, d_head], coordinate by coordinate times 1 + its vector."""
    return z * (1 + vectors)


def most_moved(found: xr.Dataset, count: int) -> list[Head]:
    """The `count` heads with the largest scores, largest first."""
    scores = found["score"]
    if count > scores.size:
        raise AnalysisError(f"count={count}, but there are {scores.size} heads; give 1 to {scores.size}")
    order = np.argsort(-scores.values.ravel(), kind="stable")[:count]
    layers = found["layer"].values
    return [Head(int(layers[n // scores.shape[1]]), int(n % scores.shape[1])) for n in order]
