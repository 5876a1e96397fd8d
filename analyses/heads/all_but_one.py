"""All but one: the loss when every head of a layer except one is ablated.

Michel, Levy & Neubig 2019 (arXiv 1905.10650): if the best head alone does as well, the layer has heads to spare. One
half of the examples chooses the best head and the other half judges it, because the best of many looks too good on the
examples that chose it.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses._prompts.examples import Examples, Loss, batches_of, loss_of
from headwater.analyses.heads._losses_without_heads import losses_without
from headwater.lens.edits.heads import Ablation
from headwater.lens.model import HookedModel


@analysis
def all_but_one(
    model: HookedModel,
    examples: Examples,
    loss: Loss | None = None,
    ablation: Annotated[Ablation, "output that replaces that of the other heads"] = "zero",
    batch_size: BatchSize = 16,
    draws: Draws = 1000,
    seed: Annotated[int, "seed of the halves, of resampling and of the intervals", Bounds(0)] = 0,
) -> xr.Dataset:
    """`change[l, h] = E_x [loss(x; the other heads of layer l ablated) - loss(x)]`.

    Dataset: `change`, `low`, `high` [layer, head] with a 95 % bootstrap interval over examples; `per_example`
    [batch, layer, head]. `best` [layer] is the head with the smallest mean change on the examples where `choosing`
    [batch] is true, a half drawn with `seed`. `best_change`, `best_low`, `best_high` [layer] are its change on the
    other half, NaN with one example. In a layer with one head the change is 0.

    Question: How much is lost when one head alone stays in a layer?
    Unit: change of the loss; nats with the default loss.
    Source: Michel, Levy & Neubig 2019, arXiv:1905.10650; held to its protocol, with two halves of the examples in the
    place of its validation and test sets.
    Cost: layers × heads passes per batch, many at once, each starting at its layer.
    Not for: pruning several layers at once: all other layers are whole here; see prune_heads.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> texts = ["When Mary and John went to the store , John gave a drink to"]
    >>> found = hw.analyses.all_but_one(model, texts, draws=10)
    >>> bool((found.change.sel(layer=0) > 1).all())  # layer 0 needs more than one head
    True
    """
    batches = batches_of(model, examples, batch_size)
    value = loss_of(model, loss)
    others = ~torch.eye(model.n_heads, dtype=torch.bool)
    base, after = losses_without(model, batches, value, others, ablation, seed, "all but one")
    rows = (after - base[:, None, None]).numpy()
    choosing = np.zeros(len(rows), dtype=bool)
    choosing[np.random.default_rng(seed).permutation(len(rows))[: (len(rows) + 1) // 2]] = True
    best = rows[choosing].mean(0).argmin(-1)
    judged = np.take_along_axis(rows[~choosing], best[None, :, None], 2)[..., 0]
    return xr.Dataset(
        {
            **intervals(rows, ("layer", "head"), draws, seed, ("change", "low", "high")),
            "per_example": (("batch", "layer", "head"), rows),
            "best": ("layer", best),
            **intervals(judged, ["layer"], draws, seed, ("best_change", "best_low", "best_high")),
            "choosing": ("batch", choosing),
        },
        coords={"batch": np.arange(len(rows)), "layer": model.layers, "head": np.arange(model.n_heads)},
        attrs={"examples": len(rows)},
    )
