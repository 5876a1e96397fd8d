"""Head significance: whether the ablation of one head changes the loss by more than chance.

A paired bootstrap over examples (Michel, Levy & Neubig 2019 use p < .01), with p corrected for the number of heads. The
result keeps the change of every example, so that other tests can be run on it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds
from headwater.analyses._measures.bootstrap import corrected_p, intervals
from headwater.analyses._prompts.examples import Examples, Loss
from headwater.analyses.heads.head_importance import head_importance
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

SLICE = 2000  # redrawings in memory at once


@analysis
def head_significance(
    model: HookedModel,
    examples: Examples,
    loss: Loss | None = None,
    ablation: Annotated[Ablation, "output that replaces the head's"] = "zero",
    correction: Annotated[
        Literal["holm", "benjamini_hochberg"] | None,
        "holm: no false head at all; benjamini_hochberg: few false among those found; none: each alone",
    ] = "holm",
    level: Annotated[float, "corrected p below which a head counts as significant", Bounds(0.0, 1.0)] = 0.01,
    draws: Annotated[int, "redrawings of the examples", Bounds(100)] = 20_000,
    batch_size: BatchSize = 16,
    seed: Annotated[int, "seed of the redrawings", Bounds(0)] = 0,
) -> xr.Dataset:
    """`effect[l, h] = mean_x d_x`, `d_x = loss(x; head ablated) - loss(x)`, and its p-value.

    `p = (1 + #{|mean of redrawn (d - effect)| >= |effect|}) / (draws + 1)`, two-sided; every head has the same redrawn
    examples. `p_corrected` over all heads is Holm's (chance of any false head) or Benjamini and Hochberg's (share of
    false heads among those found). Dataset: `effect`, `low`, `high` (95 %), `p`, `p_corrected`, `significant`
    [layer, head], `per_example` [batch, layer, head]. The smallest p is 1 / (draws + 1), so Holm's correction of n
    heads needs n / level draws: AnalysisError for fewer, and for one example.

    Question: Which heads change the loss by more than chance when they are removed?
    Unit: effect: change of the loss, nats with the default loss; p: probability.
    Source: Michel, Levy & Neubig 2019, arXiv:1905.10650 (paired bootstrap); Holm 1979; Benjamini & Hochberg 1995;
    corrections from memory, the shift of the differences to a mean of 0 is ours.
    Cost: head_importance by ablation; then draws × examples × heads multiplications.
    Not for: size: a tiny effect is significant with enough examples; heads that back each other up; under 20
    examples.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> start = "When Mary and John went to the store ,"
    >>> texts = [f"{start} {name} gave a drink to" for name in ("John", "Mary")]
    >>> found = hw.analyses.head_significance(model, texts, correction=None, draws=100)
    >>> found.p.shape, bool(found.p.min() >= 1 / 101)
    ((4, 8), True)
    """
    tests = model.n_layers * model.n_heads
    if correction == "holm" and (draws + 1) * level < tests:
        raise AnalysisError(
            f"draws={draws} can not reach level={level} for {tests} heads; "
            f"give {int(tests / max(level, 1e-9)) + 1} or more"
        )
    rises = head_importance(
        model, examples, how="ablation", loss=loss, ablation=ablation, batch_size=batch_size, seed=seed,
        per_example=True,
    )  # fmt: skip
    rows = rises.values.reshape(len(rises), -1)
    if len(rows) < 2:
        raise AnalysisError("one example has no chance to compare with; give two or more, better 20")
    p = paired_bootstrap(rows, draws, seed)
    corrected = corrected_p(p, correction)
    dims, shape = ("layer", "head"), rises.shape[1:]
    tested = {"p": p, "p_corrected": corrected, "significant": corrected < level}
    return xr.Dataset(
        {
            **intervals(rises.values, dims, min(draws, SLICE), seed, ("effect", "low", "high")),
            **{name: (dims, values.reshape(shape)) for name, values in tested.items()},
        },
        coords={"layer": model.layers, "head": np.arange(model.n_heads), "batch": np.arange(len(rows))},
        attrs={"examples": len(rows)},
    ).assign(per_example=(("batch", "layer", "head"), rises.values))


def paired_bootstrap(differences: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Two-sided p of the mean over axis 0 of [example, test] being 0, by redrawing the examples."""
    count = len(differences)
    effect = differences.mean(0)
    centred = differences - effect
    # a little below the effect, so that rounding does not hide a redrawn mean that equals it
    reach = np.abs(effect) * (1 - 1e-12)
    generator = np.random.default_rng(seed)
    larger = np.zeros(effect.shape)
    for start in range(0, draws, SLICE):
        times = generator.multinomial(count, np.full(count, 1 / count), size=min(SLICE, draws - start))
        larger += (np.abs(times @ centred / count) >= reach).sum(0)
    return (1 + larger) / (draws + 1)
