"""Pruned heads: a measure of the model while heads are removed, the least important first.

Michel, Levy & Neubig 2019 (arXiv 1905.10650). Gates of 0 remove the heads in the order of their importance, computed
once or anew after each step. Random orders are controls. `speed` times models whose weights lack the heads.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses._measures.measure import Measure
from headwater.analyses._prompts.examples import Batch, Examples, Loss, Value, batches_of, loss_of
from headwater.analyses.heads.head_importance import head_importance
from headwater.lens.edits import ScaleHeads
from headwater.lens.errors import ModelError
from headwater.lens.loading.removal import remove_heads
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import every_head
from headwater.lens.progress import progress

REPEATS = 5


@analysis
def prune_heads(
    model: HookedModel,
    examples: Examples,
    measure: Measure | None = None,
    step: Annotated[float, "fraction of heads removed at each step", Bounds(0, 1, above=True)] = 0.1,
    loss: Loss | None = None,
    importance: Annotated[Literal["gradient", "ablation"], "how heads are ranked"] = "gradient",
    recompute: Annotated[bool, "rank the remaining heads anew after each step"] = False,
    normalise: Annotated[Literal["layer"] | None, "divide each layer's importance by its l2 norm"] = "layer",
    controls: Annotated[int, "random orders to compare with", Bounds(0)] = 1,
    speed: Annotated[bool, "time models whose weights lack the heads"] = False,
    batch_size: BatchSize = 16,
    draws: Draws = 1000,
    seed: Annotated[int, "seed of random orders and intervals", Bounds(0)] = 0,
) -> xr.Dataset:
    """The measure after the fraction `k · step` of all heads is removed, the least important heads first.

    The measure is `measure(logits) → [batch]`, or else the loss of each example. Importance is the slope (or effect of
    removal) of `loss`, else of the measure, else of the next-token loss. A layer may lose all its heads; the residual
    stream and the biases stay. Dataset: `measure`, `low`, `high` [fraction] (95 % bootstrap over examples),
    `per_example` [batch, fraction], `random` [control, fraction], `heads_left` [fraction], `removed` [fraction, layer,
    head], `order` [rank] ("layer.head", the first removed first) and `importance` [layer, head] of the whole model.
    With `speed` also `speed` [fraction]: time of the whole model over the time of `headwater.remove_heads`, median of 5
    alternating runs on the batch with the most tokens; NaN if the architecture or a group cut in part forbids removal.

    Question: How many heads can be removed before the model notices?
    Unit: that of the measure (nats with the default loss); speed: times that of the whole model.
    Source: Michel, Levy & Neubig 2019, arXiv:1905.10650, held to its schedule; random orders are ours.
    Cost: (1 + controls) · (1/step + 1) passes over the examples, and head_importance once or at each step.
    Not for: the best set of a size: the order is greedy; texts unlike the examples; models trained on after
    pruning.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.prune_heads(model, text, step=0.5, controls=0, draws=10)
    >>> found.heads_left.values.tolist(), bool(found.measure[-1] > found.measure[0] + 1)
    ([32, 16, 0], True)
    """
    batches = batches_of(model, examples, batch_size)
    ask: Loss | None = None if measure is None else lambda logits, tokens: measure(logits)
    value = loss_of(model, loss if measure is None else ask)
    fractions = np.append(np.arange(0, 1 - 1e-9, step), 1.0)
    names = [str(head) for head in every_head(model.layers, model.n_heads)]
    total = len(names)
    counts = np.round(fractions * total).astype(int)

    def ranked(gone: list[int]) -> np.ndarray:
        with model.edit(ScaleHeads({names[n]: 0.0 for n in gone})):
            found = head_importance(
                model, examples, how=importance, loss=loss or ask, normalise=normalise, batch_size=batch_size
            )
        return found.values

    first = ranked([])
    order = np.argsort(first, axis=None, kind="stable").tolist()
    if recompute:
        order = _again(counts, ranked, order)
    random = [np.random.default_rng([seed, n]).permutation(total).tolist() for n in range(controls)]
    curves = [
        _curve(model, batches, value, way, counts)
        for way in progress([order, *random], desc="prune heads", unit="order")
    ]
    ordered = np.array(names)[order]
    removed = np.stack([np.isin(np.arange(total), order[:n]) for n in counts])
    found = {
        **intervals(curves[0], ["fraction"], draws, seed, ("measure", "low", "high")),
        "per_example": (("batch", "fraction"), curves[0]),
        "random": (("control", "fraction"), np.array([c.mean(0) for c in curves[1:]]).reshape(-1, len(counts))),
        "heads_left": ("fraction", total - counts), "order": ("rank", ordered),
        "removed": (("fraction", "layer", "head"), removed.reshape(-1, model.n_layers, model.n_heads)),
        "importance": (("layer", "head"), first),
    }  # fmt: skip
    if speed:
        largest = max(batches, key=lambda batch: batch.ids.numel())
        found["speed"] = (
            "fraction",
            np.array([speed_without(model, ordered[:n].tolist(), largest) for n in counts]),
        )
    coords = {"fraction": fractions, "layer": model.layers, "head": np.arange(model.n_heads)}
    return xr.Dataset(found, coords, {"examples": len(curves[0])})


def speed_without(model: HookedModel, heads: list[str], batch: Batch) -> float:
    """Time of the whole model over the time without `heads`, on one batch; NaN if they can not be removed."""
    try:
        whole, smaller = remove_heads(model, []), remove_heads(model, heads)
    except ModelError:
        return float("nan")
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(REPEATS + 1):  # the first runs warm up
            for hf, taken in zip((whole, smaller), times, strict=True):
                begin = time.perf_counter()
                hf(input_ids=batch.ids.to(model.device))
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                taken.append(time.perf_counter() - begin)
    return float(np.median(times[0][1:]) / np.median(times[1][1:]))


def _again(counts: np.ndarray, ranked, order: list[int]) -> list[int]:
    """The order if importance is computed anew among the remaining heads."""
    gone = order[: counts[1]]
    for count in counts[2:]:
        ranking = np.argsort(ranked(gone), axis=None, kind="stable").tolist()
        gone = gone + [n for n in ranking if n not in set(gone)][: count - len(gone)]
    return gone


def _curve(
    model: HookedModel, batches: list[Batch], value: Value, order: list[int], counts: np.ndarray
) -> np.ndarray:
    """The measure of each example after each number of removed heads, [example, step]."""
    found = torch.zeros(sum(len(batch.places) for batch in batches), len(counts), dtype=torch.float64)
    with torch.no_grad():
        for place, count in enumerate(counts):
            gates: Tensor = torch.ones(model.n_layers * model.n_heads)
            gates[order[:count]] = 0
            with model.gated(gates.view(1, model.n_layers, model.n_heads)):
                for batch in batches:
                    found[batch.places, place] = value(batch).double().cpu()
    return found.numpy()
