"""Faithfulness of attribution methods: how a prediction changes when the tokens that a method names are removed or
kept.

Deletion and insertion curves (Samek et al. 2015, arXiv 1509.06321; Petsiuk et al. 2018, arXiv 1806.07421),
comprehensiveness and sufficiency (DeYoung et al. 2020, arXiv 1911.03429). A random order is always tried too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws
from headwater.analyses._inputs.blanks import Blanks
from headwater.analyses._inputs.inputs import Inputs
from headwater.analyses._measures.blanks import BlankSetting
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses._measures.measure import (
    AnswerSetting,
    Explained,
    KindSetting,
    Measure,
    PositionSetting,
    WrongSetting,
)
from headwater.analyses._prompts.examples import Examples
from headwater.analyses.tokens._attributions import Given, Methods, weights_by_method
from headwater.analyses.tokens._sinks_aside import Without
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

PARTS = (0.01, 0.05, 0.1, 0.2, 0.5)  # of the tokens, for comprehensiveness and sufficiency
CURVES, DROPS = ("deletion", "insertion"), ("comprehensiveness", "sufficiency")


@analysis
def faithfulness(
    model: HookedModel,
    examples: Examples,
    methods: Annotated[
        Methods | Given, 'names such as "rollout blank_out"; in Python also weights [batch, token] by name'
    ] = "raw_attention rollout input_x_gradient",
    steps: Annotated[int, "points of the curves beside 0", Bounds(1)] = 10,
    absolute: Annotated[bool, "order tokens by size, not by sign and size"] = False,
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "probability",
    blank: BlankSetting = None,
    draws: Draws = 1000,
    seed: Annotated[int, "seed of the random order and of the draws", Bounds(0)] = 0,
    batch_size: BatchSize = 16,
    without: Annotated[Without, "rollout, flow: set the attention to sinks aside; none: leave it in"] = None,
) -> xr.Dataset:
    """Curves `deletion`, `insertion` [batch, attribution, fraction], four scores [batch, attribution], and intervals.

    A method orders the input tokens (as `blank_out` lists them): the largest weight first, equal ones by position.
    `deletion` is s with the first `fraction` of the tokens blank, `insertion` s with all others blank. The areas are
    the means of these curves (trapezoids): a good order has a small deletion area and a large insertion area.
    `comprehensiveness` is the mean of `s(x) - s(x without the first ⌈p·n⌉)` over p = 1, 5, 10, 20, 50 % (large is
    good); `sufficiency` is the mean of `s(x) - s(the first ⌈p·n⌉ alone)` (small is good). `mean`, `low`, `high` [score,
    attribution] are over texts, with 95 % of the means of redrawn texts. "random" is an order by chance. `s` is the
    number that `blank_out` explains. `without="sinks"` sets attention sinks aside in `rollout` and `flow`, as `rollout`
    says.

    Question: Does the prediction depend on the tokens that a method names?
    Unit: that of what is explained (probability); areas: its mean along the curve.
    Source: Petsiuk et al. 2018, arXiv:1806.07421 (curves); DeYoung et al. 2020, arXiv:1911.03429 (the other two);
    formulas from memory.
    Cost: each method once per text, then 2·(steps + 5) forward passes per text and method.
    Not for: scores by themselves: blanks make texts unlike any the model has read; compare with the random order.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.faithfulness(model, [prompt], "raw_attention", steps=2, draws=10)
    >>> found.attribution.values.tolist(), found.deletion[0, 0].round(1).values.tolist()
    (['raw_attention', 'random'], [1.0, 0.0, 0.0])
    """
    asked = Explained(model, measure, answer, wrong, position, kind, of_classes=True)
    inputs = Inputs.of(model, examples, batch_size)
    blanks = Blanks.of(inputs, blank)
    rows = weights_by_method(model, inputs, methods, asked, without)
    if "random" in rows:
        raise AnalysisError("random is the name of the control; call a method of your own something else")
    generator = np.random.default_rng(seed)
    rows["random"] = [generator.permutation(int(row.sum())).astype(float) for row in inputs.entered.numpy()]
    fractions = np.linspace(0, 1, steps + 1)
    shape = (len(inputs.valid), len(rows))
    found = {name: np.full((*shape, steps + 1), np.nan) for name in CURVES}
    found |= {name: np.full(shape, np.nan) for name in DROPS}
    for batch in inputs.batches:
        value = asked.of(batch)
        for place, weights in enumerate(rows.values()):
            ranks = torch.stack([_ranks(weights[text], absolute) for text in batch.places])
            ask = lambda gone, value=value, batch=batch: blanks.scores(batch, value, gone, batch_size)  # noqa: E731
            entered = torch.cat([each.places for each in inputs.entrances(batch)])
            for name, values in _scored(ranks, entered, fractions, ask).items():
                found[name][batch.places, place] = values
    scores = {f"{name}_area": np.trapezoid(found[name], fractions, axis=-1) for name in CURVES}
    scores |= {name: found[name] for name in DROPS}
    each = ("batch", "attribution")
    return xr.Dataset(
        {
            **{name: ((*each, "fraction"), found[name]) for name in CURVES},
            **{name: (each, values) for name, values in scores.items()},
            **intervals(np.stack(list(scores.values()), axis=1), ("score", "attribution"), draws, seed),
        },
        coords={
            "batch": np.arange(len(inputs.valid)), "attribution": list(rows), "fraction": fractions,
            "score": list(scores),
        },
        attrs={"blank": blanks.told},
    )  # fmt: skip


def _scored(
    ranks: Tensor, entered: Tensor, fractions: np.ndarray, ask: Callable[[Tensor], Tensor]
) -> dict[str, np.ndarray]:
    """Curves [text, fraction] and mean drops [text] of one method's order of the input tokens of a batch."""
    length, points = ranks.shape[1], len(fractions)
    counts = torch.from_numpy(
        np.concatenate([np.rint(fractions * length), np.ceil(np.array(PARTS) * length)]).astype(int)
    )
    first = torch.zeros(len(ranks), len(counts), len(entered), dtype=torch.bool)
    first[..., entered] = ranks[:, None] < counts[:, None]
    without = ask(first).numpy()
    alone = ask(~first & entered).numpy()
    return {
        "deletion": without[:, :points],
        "insertion": alone[:, :points],
        "comprehensiveness": (without[:, :1] - without[:, points:]).mean(1),
        "sufficiency": (without[:, :1] - alone[:, points:]).mean(1),
    }


def _ranks(weights: np.ndarray, absolute: bool) -> Tensor:
    """Rank of each token in the order, 0 the first: [token]."""
    sizes = np.abs(weights) if absolute else weights
    order = np.argsort(-sizes, kind="stable")
    return torch.from_numpy(np.argsort(order, kind="stable"))
