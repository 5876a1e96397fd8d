"""Head significance: does removing one head change the loss by more than the choice of examples does?

Paired bootstrap over examples of single-head ablation (Michel, Levy & Neubig 2019 use p < .01), corrected for having
asked about every head. The values of each example are kept, so that other tests can be made of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.bootstrap import corrected_p, intervals
from headwater.analyses._prompts.examples import Examples, Loss
from headwater.analyses.heads.head_importance import head_importance
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

SLICE = 2000  # redrawings held at once


@analysis
def head_significance(
    model: HookedModel,
    examples: Examples,
    loss: Loss | None = None,
    ablation: Annotated[Ablation, "what takes the head's place"] = "zero",
    correction: Annotated[
        Literal["holm", "benjamini_hochberg"] | None,
        "holm: no false head at all; benjamini_hochberg: few false among those found; none: each alone",
    ] = "holm",
    level: Annotated[float, "corrected p below which a head counts as significant", Bounds(0.0, 1.0)] = 0.01,
    draws: Annotated[int, "redrawings of the examples", Bounds(100)] = 20_000,
    batch_size: Annotated[int, "examples of equal length that run together", Bounds(1)] = 16,
    seed: Annotated[int, "seed of the redrawings", Bounds(0)] = 0,
) -> xr.Dataset:
    """`effect[l, h] = mean_x d_x`, `d_x = loss(x; head gone) - loss(x)`, and the chance of so large a mean without it.

    `p = (1 + #{|mean of redrawn (d - effect)| >= |effect|}) / (draws + 1)`: two-sided, the same redrawn examples for
    every head. `p_corrected` is Holm's (chance of any false head) or Benjamini and Hochberg's (share of false ones
    among those found) over all heads. Dataset: `effect`, `low`, `high` (95 %), `p`, `p_corrected`, `significant`
    [layer, head], `per_example` [batch, layer, head]. The smallest p is 1 / (draws + 1): Holm's over n heads needs
    n / level draws, and fewer are refused. Unit: that of the loss; probability.
    Source: the corrections from their papers' formulas, from memory; the shape of the test (shifted to no effect) ours.

    Question: Which heads change the loss by more than chance when they are removed?
    Unit: effect: change of the loss, nats with the default loss; p: probability.
    Source: Michel, Levy & Neubig 2019, arXiv:1905.10650 (paired bootstrap); Holm 1979; Benjamini & Hochberg 1995.
    Cost: head_importance by ablation; then draws × examples × heads multiplications.
    Not for: size: a tiny effect is significant with enough examples; heads that back each other up; under 20
    examples.
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
    result = xr.Dataset(
        {
            **intervals(rises.values, dims, min(draws, SLICE), seed, ("effect", "low", "high")),
            **{name: (dims, values.reshape(shape)) for name, values in tested.items()},
        },
        coords={"layer": model.layers, "head": np.arange(model.n_heads), "batch": np.arange(len(rows))},
    ).assign(per_example=(("batch", "layer", "head"), rises.values))
    return result.assign_attrs({"examples": len(rows)})


def paired_bootstrap(differences: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Two-sided p of the mean over axis 0 of [example, test] being 0, by redrawing the examples."""
    count = len(differences)
    effect = differences.mean(0)
    centred = differences - effect
    # rounding apart, an example without any difference has no mean as large as its own
    reach = np.abs(effect) * (1 - 1e-12)
    generator = np.random.default_rng(seed)
    larger = np.zeros(effect.shape)
    for start in range(0, draws, SLICE):
        times = generator.multinomial(count, np.full(count, 1 / count), size=min(SLICE, draws - start))
        larger += (np.abs(times @ centred / count) >= reach).sum(0)
    return (1 + larger) / (draws + 1)
