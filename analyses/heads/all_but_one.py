"""All but one: what is left of a layer when one head alone stays in it.

Michel, Levy & Neubig 2019 (arXiv 1905.10650): a layer whose best head does as well alone has heads to spare. The best
head is chosen on one half of the examples and judged on the other, for the best of many is flattered by its choice.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses._prompts.examples import Examples, Loss, batches_of, loss_of
from headwater.analyses.heads._losses_without_heads import check_ablation, losses_without
from headwater.lens.edits.heads import Ablation
from headwater.lens.model import HookedModel


@analysis
def all_but_one(
    model: HookedModel,
    examples: Examples,
    loss: Loss | None = None,
    ablation: Annotated[Ablation, "what takes the place of the other heads"] = "zero",
    batch_size: Annotated[int, "examples of equal length that run together", Bounds(1)] = 16,
    draws: Annotated[int, "redrawings of the examples for the intervals", Bounds(1)] = 1000,
    seed: Annotated[int, "seed of the halves, of resampling and of the intervals", Bounds(0)] = 0,
) -> xr.Dataset:
    """`change[l, h] = E_x [loss(x; of layer l only head h) - loss(x)]`, the other heads of that layer being ablated.

    Dataset: `change`, `low`, `high` [layer, head] (95 % bootstrap interval over examples), `per_example`
    [batch, layer, head]; `best` [layer], the head with the smallest mean change on the examples where `choosing`
    [batch] is true (half of them, drawn with `seed`), and `best_change`, `best_low`, `best_high` [layer] of that head
    on the others. With one example there are no others, and these are NaN. A layer with one head changes nothing.
    Unit: that of the loss. Source: the paper's protocol, checked; the halves stand for its validation and test sets.

    Question: How much is lost when one head alone stays in a layer?
    Unit: change of the loss; nats with the default loss.
    Source: Michel, Levy & Neubig 2019, arXiv:1905.10650.
    Cost: layers × heads passes per batch, many at once, each begun at its layer.
    Not for: pruning several layers at once: each layer is tried with all others whole; see prune_heads.
    """
    batches = batches_of(model, examples, batch_size)
    check_ablation(ablation, batches)
    value = loss_of(model, loss)
    others = ~torch.eye(model.n_heads, dtype=torch.bool)
    base, after = losses_without(model, batches, value, others, ablation, seed, "all but one")
    rows = (after - base[:, None, None]).numpy()
    choosing = np.zeros(len(rows), dtype=bool)
    choosing[np.random.default_rng(seed).permutation(len(rows))[: (len(rows) + 1) // 2]] = True
    best = rows[choosing].mean(0).argmin(-1)
    judged = np.take_along_axis(rows[~choosing], best[None, :, None], 2)[..., 0]
    result = xr.Dataset(
        {
            **intervals(rows, ("layer", "head"), draws, seed, ("change", "low", "high")),
            "per_example": (("batch", "layer", "head"), rows),
            "best": ("layer", best),
            **intervals(judged, ["layer"], draws, seed, ("best_change", "best_low", "best_high")),
            "choosing": ("batch", choosing),
        },
        coords={"batch": np.arange(len(rows)), "layer": model.layers, "head": np.arange(model.n_heads)},
    )
    settings = {"examples": len(rows)}
    return result.assign_attrs(settings)
