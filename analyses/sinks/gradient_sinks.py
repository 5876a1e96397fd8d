"""Gradient sinks: the keys on whose attention weights the loss depends most, by the sum of the slopes in their column.

Attention can go to one key while the gradient goes to another. Σ_i |∂L/∂A_ij| of a key (arXiv 2603.17771) needs the
gradient of every weight; it is `(∂L/∂z_i)·v_j`, multiplied out in blocks of rows, so memory is linear in the length.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import numpy as np
import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._prompts.examples import Examples, Loss, loss_of
from headwater.analyses._prompts.positions import Positions, columns_of
from headwater.analyses._prompts.texts import Texts
from headwater.analyses.tokens._gradients import WeightSlopes, slopes_of_run
from headwater.kernels.tiles.block import Block
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress

NAMES = ("mass", "by_weight", "signed")


@analysis
def gradient_sinks(
    model: HookedModel,
    examples: Examples,
    keys: Annotated[Positions, "the sinks, counted in real tokens of each text; 0 is the first"] = 0,
    loss: Loss | None = None,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """`mass` [batch, layer, head, key] is `Σ_i |∂L/∂A_ij|` over the queries i that see the key j.

    `by_weight` is `Σ_i A_ij |∂L/∂A_ij|` and `signed` is `Σ_i A_ij ∂L/∂A_ij`, to first order minus the change of the
    loss when the head's weights on the key go to 0 and the others stay. L is the loss of each example by itself: that
    of `model.loss`, or `loss(outputs, tokens) → [batch]`. `share` [of, batch, layer, head] is what the `keys` have of
    the sum over all keys, for "mass" and "by_weight", beside "queries", the share of (query, key) pairs that are
    theirs. A weight is taken as free: the softmax, which lets the others of its row change with it, is not part of
    the slope. With `model.part("encoder")` heads and keys are the encoder's, the loss that of the whole model.

    Question: On which keys' attention weights does the loss depend?
    Unit: loss per unit of weight (nats with the default loss); by_weight and signed: loss.
    Source: arXiv:2603.17771 names gradient sinks (from memory); compared with dense gradients.
    Cost: one forward and backward pass, then all rows of each layer once; memory O(layers·S·d), time O(layers·S²·d).
    Not for: the effect of removing a sink, which is no small step (sink_contribution, redistribution_study).

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> found = hw.analyses.gradient_sinks(model, "When Mary and John went to the store")
    >>> found.mass.shape, bool((found.by_weight <= found.mass).all())
    ((1, 4, 8, 9), True)
    """
    texts, value = Texts.of(model, examples, batch_size), loss_of(model, loss, grad=True)
    found = {name: texts.empty(model.n_layers, model.n_heads) for name in (*NAMES, "queries")}
    for batch in progress(texts.batches, desc="gradient sinks", unit="batch"):
        slopes = slopes_of_run(model, partial(value, batch))
        columns = [_columns(slopes.pop(layer)) for layer in list(slopes)]
        for name, layers in zip(found, zip(*columns, strict=True), strict=True):
            texts.spread(batch, torch.stack(layers, 1), found[name])
    picked = torch.zeros_like(texts.keys.valid)
    picked.scatter_(1, columns_of(keys, texts.keys.valid, "keys"), True)
    picked &= texts.keys.valid
    shares = {
        name: (found[name] * picked[:, None, None]).nansum(-1) / found[name].nansum(-1)
        for name in ("mass", "by_weight", "queries")
    }
    dims = ("batch", "layer", "head")
    return xr.Dataset(
        {name: ((*dims, "key"), found[name].numpy()) for name in NAMES}
        | {"share": (("of", *dims), torch.stack(list(shares.values())).numpy())},
        coords={
            "layer": model.layers,
            "head": np.arange(model.n_heads),
            "of": list(shares),
            "token": (("batch", "key"), np.array(texts.keys.strings, dtype=object).astype(str)),
        },
    )


def _columns(slopes: WeightSlopes) -> list[torch.Tensor]:
    """The sums over the queries of |g|, A|g| and A·g, and how many queries see the key: each [text, head, key]."""
    map = slopes.map
    batch, heads, _, keys = map.shape
    sums = [slopes.slope.new_zeros(batch, heads, keys) for _ in NAMES]
    seen = map.rule.mask.seen_by(batch, heads).expand(batch, heads, keys).double().cpu()
    for rows, weights, slope in slopes.row_blocks():
        block = Block(slice(0, batch), torch.arange(heads), rows, slice(0, keys))
        visible = map.rule.mask.tile(block, slope.device)
        if visible is not None:
            slope = slope.masked_fill(~visible, 0.0)
        for total, each in zip(sums, (slope.abs(), weights * slope.abs(), weights * slope), strict=True):
            total += each.sum(2)
    return [*(total.cpu() for total in sums), seen]
