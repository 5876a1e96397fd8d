"""Head importance: the slope of the loss at a gate on each head, or the change of the loss when a head is ablated.

Michel, Levy & Neubig 2019 (arXiv 1905.10650). Gradient: one forward and one backward pass for all heads. Ablation:
each head once, many in one pass that starts at the layer of the head. Both treat one head at a time, so two heads that
can replace each other look unimportant.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds
from headwater.analyses._prompts.examples import (
    Batch,
    Examples,
    Loss,
    Value,
    batches_of,
    differentiable,
    lengths_of,
    loss_of,
    queries_of,
)
from headwater.analyses.heads._losses_without_heads import losses_without
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress

Granularity = Literal["token", "example", "batch"]


@analysis
def head_importance(
    model: HookedModel,
    examples: Examples,
    how: Annotated[Literal["gradient", "ablation"], "slope, or effect of removal"] = "gradient",
    loss: Loss | None = None,
    granularity: Annotated[Granularity, "gradient: absolute value per"] = "example",
    normalise: Annotated[
        Literal["layer", "last_layer_by_examples"] | None, "divide each layer by its l2 norm, or as released"
    ] = None,
    ablation: Annotated[Ablation, "output that replaces the head's (ablation only)"] = "zero",
    batch_size: BatchSize = 16,
    seed: Annotated[int, "seed of resampling", Bounds(0)] = 0,
    per_example: Annotated[bool, "keep one value per example instead of their mean"] = False,
    signed: Annotated[bool, "gradient: estimate the rise of the loss, with its sign"] = False,
) -> xr.DataArray:
    """`I[l, h] = E_x |∂loss(x)/∂ξ_lh|` at gates ξ = 1 on the heads' outputs, as [layer, head].

    `granularity="token"` has one gate per position: `I[l, h] = Σ_{x,i} |∂loss(x)/∂ξ_lhi| / #tokens`. "batch" takes
    `|mean of the batch's gradients|`, averaged over batches, so it depends on `batch_size`.
    `how="ablation"`: `I[l, h] = E_x [loss(x; head ablated) - loss(x)]`, above 0 if the head helps. The head's output z
    becomes 0, its mean over the positions of all examples, or z at the same position of another example, drawn with
    `seed` among those that are at least as long.
    `normalise="layer"`: `I[l, :] / (‖I[l, :]‖₂ + 1e-20)`. "last_layer_by_examples" is what the released code does where
    it does not normalise, with granularity "token": the last layer's sum is divided by the number of examples, the
    others' by that of tokens, so that the last layer looks more important. `per_example` keeps [batch, layer, head]
    (AnalysisError with "batch"). `signed` gives `E_x [-∂loss(x)/∂ξ_lh]`, to first order the rise of the loss when the
    head is set to zero: above 0 if the head helps (granularity "example" only).

    The loss is that of `model.loss`, or `loss(outputs, tokens) → [batch]` of logits, of the similarity of each text and
    its own picture (two towers), or of the last hidden states of a model without a head. With `model.part("encoder")`
    the heads are the encoder's, and the loss stays that of the whole model; tokens are those of the part. Only examples
    of equal length share a batch, so there is no padding.

    Question: Which heads does the loss depend on?
    Unit: change of the loss per unit of the head's gate (gradient) or when it is ablated; nats with the default
    loss.
    Source: Michel, Levy & Neubig 2019, arXiv:1905.10650, held to its formulas; the token form is from memory.
    Cost: gradient: one forward and backward pass per batch; ablation: layers × heads passes per batch, many at
    once.
    Not for: heads that back each other up (remove them together instead); causal claims from the gradient alone.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.head_importance(model, text, how="ablation")
    >>> found.shape, bool(found.mean() > 0)  # most heads help
    ((4, 8), True)
    """
    if per_example and how == "gradient" and granularity == "batch":
        raise AnalysisError(
            'granularity="batch" has no value per example; use "example" or per_example=False'
        )
    uneven = normalise == "last_layer_by_examples"
    if uneven and (how, granularity, per_example) != ("gradient", "token", False):
        raise AnalysisError(
            'normalise="last_layer_by_examples" is for how="gradient", granularity="token" and per_example=False'
        )
    if signed and (how, granularity) != ("gradient", "example"):
        raise AnalysisError('signed=True is for how="gradient" and granularity="example"')
    batches = batches_of(model, examples, batch_size)
    value = loss_of(model, loss)
    if how == "gradient":
        rows = _by_gradient(model, batches, value, granularity, signed)
    else:
        each = torch.eye(model.n_heads, dtype=torch.bool)
        base, after = losses_without(model, batches, value, each, ablation, seed, "head importance")
        rows = after - base[:, None, None]
    result = xr.DataArray(
        rows.numpy(),
        dims=("batch", "layer", "head"),
        coords={"layer": model.layers, "head": np.arange(model.n_heads)},
        name="head_importance",
    )
    if per_example:
        result = result.assign_coords(batch=np.arange(len(rows)))
    elif how == "gradient" and granularity == "token":
        result = result.weighted(xr.DataArray(lengths_of(model, batches), dims="batch")).mean("batch")
    else:
        result = result.mean("batch")
    if uneven:
        lengths = lengths_of(model, batches)
        result[-1] *= sum(lengths) / len(lengths)
    if normalise == "layer":
        result = result / (np.sqrt((result**2).sum("head")) + 1e-20)
    return result.assign_attrs(examples=sum(len(batch.places) for batch in batches))


def _by_gradient(
    model: HookedModel, batches: list[Batch], value: Value, granularity: str, signed: bool
) -> Tensor:
    """|∂loss/∂gate|, or -∂loss/∂gate where `signed`, [example, layer, head]; one row per batch for "batch"."""
    found = {}
    for batch in progress(batches, desc="head importance", unit="batch"):
        queries = queries_of(model, batch.ids)
        each = len(queries) // len(batch.ids)  # pictures of an example
        if granularity == "token":
            size = (len(queries), model.n_layers, model.n_heads, queries.shape[1])
        else:
            size = (len(batch.ids), model.n_layers, model.n_heads)
        gates = torch.ones(*size, device=batch.ids.device, requires_grad=True)
        rows = gates if granularity == "token" else gates.repeat_interleave(each, 0)
        with torch.enable_grad(), model.gated(rows):
            (slope,) = torch.autograd.grad(differentiable(value(batch), "the loss").sum(), gates)
        slope = slope.detach().double().cpu()
        if granularity == "batch":
            found[batch.places[0]] = slope.mean(0).abs()
            continue
        # each token's gate acts on its example's loss: the mean over tokens of the absolute slopes
        slope = -slope if signed else slope.abs()
        if granularity == "token":
            slope = slope.unflatten(0, (-1, each)).mean((1, -1))
        found |= dict(zip(batch.places, slope, strict=True))
    return torch.stack([found[place] for place in sorted(found)])
