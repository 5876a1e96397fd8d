"""Pruned heads: a measure of the model while heads are removed, the least important first.

Michel, Levy & Neubig 2019 (arXiv 1905.10650). Gates of 0 remove the heads in the order of their importance, computed
once or anew after each step. Random orders are controls. `speed` times models whose weights lack the heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses._measures.measure import Measure
from headwater.analyses._prompts.examples import Batch, Examples, Loss, Value, as_tokens, batches_of, loss_of
from headwater.analyses.heads._heads_of_parts import HeadsOfParts
from headwater.analyses.heads.head_importance import Granularity, head_importance
from headwater.lens.errors import AnalysisError
from headwater.lens.loading.removal import removable, remove_heads
from headwater.lens.model import HookedModel
from headwater.lens.models.inputs import arguments
from headwater.lens.progress import progress

REPEATS = 5
Unit = Literal["head", "kv_group"]


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
    unit: Annotated[Unit | None, "what is removed; none: whole KV groups where queries share keys"] = None,
    granularity: Annotated[Granularity, "gradient: absolute value per"] = "example",
    controls: Annotated[int, "random orders to compare with", Bounds(0)] = 1,
    speed: Annotated[bool, "time models whose weights lack the heads"] = False,
    parts: Annotated[
        str | None, 'parts whose heads go together, as "encoder cross"; none: the model\'s'
    ] = None,
    batch_size: BatchSize = 16,
    draws: Draws = 1000,
    seed: Annotated[int, "seed of random orders and intervals", Bounds(0)] = 0,
) -> xr.Dataset:
    """The measure after the fraction `k · step` of all heads is removed, the least important heads first.

    `unit="kv_group"` removes a key–value head with all its query heads, which weights can be cut by; its importance is
    the sum of its heads'. "head" removes single query heads. The default is the group where queries share keys.
    `granularity` is that of `head_importance`: "example" is the paper's formula; the released code takes absolute
    values per token ("token"), and its orders differ.

    The heads are those of the part as which the model is read, `model.part("cross")`. `parts` ranks the heads of
    several parts together, as in the paper's translation models: "encoder decoder cross" takes all three kinds of
    attention; `removed` and `importance` then have an axis `part`, and names are "cross 2.0".

    The measure is `measure(outputs) → [batch]`, or else the loss of each example. Importance is the slope (or effect of
    removal) of `loss`, else of the measure, else of `model.loss`. A layer may lose all its heads; the residual
    stream and the biases stay. Dataset: `measure`, `low`, `high` [fraction] (95 % bootstrap over examples),
    `per_example` [batch, fraction], `random` [control, fraction], `heads_left` [fraction], `removed` [fraction, layer,
    head], `order` [rank] ("layer.head", the first removed first) and `importance` [layer, head] of the whole model.
    With `speed` also `speed` [fraction]: time of the whole model over the time of `headwater.remove_heads`, median of 5
    alternating runs on the batch with the most tokens. Of groups that are removed in part as many heads are cut as can
    be, equally many of each. ModelError where the architecture forbids removal.

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
    every = HeadsOfParts.of(model, parts)
    if speed:
        if len(every.views) > 1:
            raise AnalysisError("speed=True takes the heads of one part; leave parts out")
        remove_heads(
            every.views[0], removable(every.views[0], "all")[: model.n_heads]
        )  # refuses before anything else
    fractions = np.append(np.arange(0, 1 - 1e-9, step), 1.0)
    total, units = len(every.names), every.groups(by_head=unit == "head")
    steps = np.round(fractions * len(units)).astype(int)

    def ranked(gone: list[int]) -> np.ndarray:
        with every.without([n for of in gone for n in units[of]]):
            found = [
                head_importance(
                    view, examples, how=importance, loss=loss or ask, granularity=granularity, normalise=normalise,
                    batch_size=batch_size,
                ).values.ravel()
                for view in every.views
            ]  # fmt: skip
        return np.concatenate(found)

    def heads_of(order: list[int]) -> list[int]:
        return [head for place in order for head in units[place]]

    first = ranked([])
    ways = [_order(first, units)]
    if recompute:
        ways = [_again(steps, lambda gone: _order(ranked(gone), units), ways[0])]
    ways += [np.random.default_rng([seed, n]).permutation(len(units)).tolist() for n in range(controls)]
    curves = [
        _curve(every, batches, value, [heads_of(way[:n]) for n in steps])
        for way in progress(ways, desc="prune heads", unit="order")
    ]
    order = heads_of(ways[0])
    counts = np.array([len(heads_of(ways[0][:n])) for n in steps])
    ordered = np.array(every.names)[order]
    removed = np.stack([np.isin(np.arange(total), order[:n]) for n in counts])
    found: dict[str, Any] = {
        **intervals(curves[0], ["fraction"], draws, seed, ("measure", "low", "high")),
        "per_example": (("batch", "fraction"), curves[0]),
        "random": (("control", "fraction"), np.array([c.mean(0) for c in curves[1:]]).reshape(-1, len(steps))),
        "heads_left": ("fraction", total - counts), "order": ("rank", ordered),
        "removed": every.arrayed(removed, ("fraction",)).fillna(0).astype(bool),
        "importance": every.arrayed(first),
    }  # fmt: skip
    if speed:
        largest = max(batches, key=lambda batch: batch.ids.numel())
        found["speed"] = (
            "fraction",
            np.array([speed_without(every.views[0], ordered[:n].tolist(), largest) for n in counts]),
        )
    return xr.Dataset(found, {"fraction": fractions}, {"examples": len(curves[0])})


def speed_without(model: HookedModel, heads: list[str], batch: Batch) -> float:
    """Time of the whole model over the time without those of `heads` that can be cut, on one batch."""
    whole, smaller = remove_heads(model, []), remove_heads(model, removable(model, heads))
    given = arguments(model, as_tokens(batch.ids))
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(REPEATS + 1):  # the first runs warm up
            for hf, taken in zip((whole, smaller), times, strict=True):
                begin = time.perf_counter()
                hf(**given)
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                taken.append(time.perf_counter() - begin)
    return float(np.median(times[0][1:]) / np.median(times[1][1:]))


def _order(importance: np.ndarray, units: list[list[int]]) -> list[int]:
    """The places of the units, the least important first."""
    flat = importance.ravel()
    return np.argsort([flat[unit].sum() for unit in units], kind="stable").tolist()


def _again(steps: np.ndarray, ranked: Callable[[list[int]], list[int]], order: list[int]) -> list[int]:
    """The order if importance is computed anew among the remaining units."""
    gone = order[: steps[1]]
    for count in steps[2:]:
        gone = gone + [n for n in ranked(gone) if n not in set(gone)][: count - len(gone)]
    return gone


def _curve(every: HeadsOfParts, batches: list[Batch], value: Value, removed: list[list[int]]) -> np.ndarray:
    """The measure of each example without each set of heads, [example, step]."""
    found = torch.zeros(sum(len(batch.places) for batch in batches), len(removed), dtype=torch.float64)
    with torch.no_grad():
        for place, heads in enumerate(removed):
            with every.gated(heads):
                for batch in batches:
                    found[batch.places, place] = value(batch).double().cpu()
    return found.numpy()
