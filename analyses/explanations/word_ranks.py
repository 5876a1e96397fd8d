"""Word ranks: whether attribution methods weigh words that are known to matter above the others.

Pruthi et al. 2020 (arXiv 1909.07913) train a classifier to hide such words from its attention. Here every method that
explains a prediction is asked for them.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Draws, Seed
from headwater.analyses._inputs.inputs import Inputs
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
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel


@analysis
def word_ranks(
    model: HookedModel,
    examples: Examples,
    words: Annotated[str, 'the words that matter, such as "he she"; each is one token'],
    methods: Annotated[
        Methods | Given, 'names such as "rollout blank_out"; in Python also weights [batch, token] by name'
    ] = "raw_attention rollout alti input_x_gradient blank_out",
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "log_probability",
    draws: Draws = 1000,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """`above` [batch, attribution]: how often a word that matters weighs more than another token; Dataset with means.

    `above` is the share of pairs (a token of `words`, another token) in which the first has the larger weight, without
    sign, ties counted half: 1 where all of them stand on top, ½ by chance, 0 where all stand at the bottom. `first` is
    1 where the largest weight is on one of them. `chance` [batch] is the share of tokens that are. `mean`, `low` and
    `high` (of `above`) and `first_mean`, `first_low`, `first_high` [attribution] are over texts, with 95 % of the means
    of redrawn texts. A text in which no token, or every token, is one of the words is left out (NaN). Methods and
    predictions are those of `agreement`; letters are compared without regard to capitals.

    Question: Do explanations show the words that a prediction is known to rest on?
    Unit: share of pairs, 0 to 1; share of texts.
    Source: ours, after Pruthi et al. 2020, arXiv:1909.07913, whose classifiers hide such words from attention.
    Cost: each method once per text.
    Not for: words of which it is not known that they matter: delete them first, and see whether the prediction falls;
        a text with several that stand in for each other: to blank_out each alone looks needless.

    >>> import headwater as hw
    >>> model = hw.load("deceptive-2l")
    >>> texts = ["mr davis worked as a farmer in york .", "people in york gave her tea and books ."]
    >>> found = hw.analyses.word_ranks(model, texts, "mr her", methods="raw_attention alti", draws=10)
    >>> found["mean"].round(1).values.tolist()  # the attention of this model hides them
    [0.0, 1.0]
    """
    asked = Explained(model, measure, answer, wrong, position, kind, of_classes=True)
    inputs = Inputs.of(model, examples, batch_size)
    wanted = {word.casefold() for word in words.split()}
    tokens = inputs.by_key(inputs.empty(), "tokens")["key_token"].values
    tokens = np.broadcast_to(tokens, inputs.entered.shape)  # without an axis of texts where all have the same
    marked = np.array([[str(text).strip("Ġ▁ ").casefold() in wanted for text in row] for row in tokens])
    marks = [row[real] for row, real in zip(marked, inputs.entered.numpy(), strict=True)]
    if not any(row.any() for row in marks):
        raise AnalysisError(f"no token of the examples is one of {', '.join(sorted(wanted)) or 'no words'}")
    rows = weights_by_method(model, inputs, methods, asked)
    above = np.stack([[_above(*pair) for pair in zip(each, marks, strict=True)] for each in rows.values()], 1)
    first = np.stack([[_first(*pair) for pair in zip(each, marks, strict=True)] for each in rows.values()], 1)
    one, both = ("attribution",), ("batch", "attribution")
    return xr.Dataset(
        {
            "above": (both, above), "first": (both, first),
            "chance": ("batch", [float(row.mean()) for row in marks]),
            **intervals(above, one, draws, seed),
            **intervals(first, one, draws, seed, ("first_mean", "first_low", "first_high")),
        },
        coords={"batch": np.arange(len(marks)), "attribution": list(rows)},
    )  # fmt: skip


def _above(weights: np.ndarray, marks: np.ndarray) -> float:
    """The share of pairs (marked, other) in which the marked token has the larger weight, without sign."""
    if marks.all() or not marks.any():
        return float("nan")
    size = np.abs(weights)
    apart = size[marks][:, None] - size[~marks]
    return float((apart > 0).mean() + (apart == 0).mean() / 2)


def _first(weights: np.ndarray, marks: np.ndarray) -> float:
    """Whether the largest weight is on a marked token, shared among ties."""
    if marks.all() or not marks.any():
        return float("nan")
    size = np.abs(weights)
    return float(marks[size == size.max()].mean())
