"""Agreement: how alike the token weights of several attribution methods are on the same predictions.

Neely et al. 2022 (arXiv 2205.04559) compare attention with gradient methods in this way and find little agreement.
scipy computes the rank correlations; the top-k form with ties, after Fagin et al., is written here. `between` compares
two rows of numbers that the caller already has.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Annotated, Any, Literal

import numpy as np
import xarray as xr
from scipy import stats

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws, Seed, checked
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
from headwater.analyses.tokens._sinks_aside import Without
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

Compared = Literal["kendall", "spearman", "pearson", "weighted_kendall", "tau_ap_b", "top_k"]

OF_SCIPY: dict[str, Callable[..., Any]] = {
    "kendall": stats.kendalltau,
    "spearman": stats.spearmanr,
    "pearson": stats.pearsonr,
    "weighted_kendall": stats.weightedtau,
}


@analysis
def agreement(
    model: HookedModel,
    examples: Examples,
    methods: Annotated[
        Methods | Given, 'names such as "rollout blank_out"; in Python also weights [batch, token] by name'
    ] = "raw_attention rollout flow input_x_gradient blank_out",
    by: Annotated[Compared, "how two rows of weights are compared"] = "kendall",
    k: Annotated[
        float | None,
        "top_k: how many buckets, below 1 a part of the tokens; none: the fewer non-zero",
        Bounds(0.0),
    ] = None,
    alpha: Annotated[float, "weighted_kendall: how fast low ranks lose weight", Bounds(0.0)] = 1.0,
    absolute: Annotated[bool, "compare sizes, as attention has no sign"] = True,
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "log_probability",
    draws: Draws = 1000,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    without: Annotated[Without, "rollout, flow: set the attention to sinks aside; none: leave it in"] = None,
) -> xr.Dataset:
    """`agreement` [batch, attribution, other], and over texts its `mean`, `low` and `high` [attribution, other].

    Each method gives one weight per input token for the prediction at `position`, as `blank_out` explains it, without
    class and register tokens. Of an encoder–decoder methods must weigh both sides; `raw_attention` then has the rows of
    cross-attention and of the decoder's own. `by` is "kendall" (τ-b), "spearman", "pearson", "weighted_kendall",
    "tau_ap_b" or "top_k". "weighted_kendall" weighs an exchange of
    ranks r and s by `1/(r+1)^α + 1/(s+1)^α`, rank 0 being the largest weight; it is the mean over the two orders.
    "tau_ap_b" is the average-precision correlation with ties, in which mistakes at the top weigh most: of each token
    below the first ones of a list, the part of the tokens above it that the other list puts above it too; it is
    `2·mean - 1`, and the mean over the two orders.
    "top_k" counts pairs of an item in the first k buckets of one list and an item in those of the other: 1 if the lists
    order them oppositely, 0.5 if exactly one list ties them; the result is `1 - 2·sum/#pairs`. A row of equal weights
    has no order: its agreement is NaN and is left out of the mean. `low` and `high` enclose 95 % of the means of
    redrawn texts. `without="sinks"` sets attention sinks aside in `rollout` and `flow`, as `rollout` says.

    Question: Do attribution methods agree on which tokens matter?
    Unit: correlation, from -1 (opposite order) to 1 (the same).
    Source: Neely et al. 2022, arXiv:2205.04559; ties in top-k lists: Fagin et al. 2006; tau_ap_b: Urbano & Marrero
    2017; held to scipy and the authors' code.
    Cost: each method once per text.
    Not for: faithfulness: methods can agree and all be wrong, or differ and each be right about something else.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.agreement(model, [prompt], "rollout flow", draws=10)
    >>> float(found["mean"].sel(attribution="rollout", other="flow").round(1))
    0.9
    """
    asked = Explained(model, measure, answer, wrong, position, kind, of_classes=True)
    inputs = Inputs.of(model, examples, batch_size)
    rows = weights_by_method(model, inputs, methods, asked, without)
    names = list(rows)
    found = np.full((len(inputs.valid), len(names), len(names)), np.nan)
    for text in range(len(found)):
        weights = [np.abs(rows[name][text]) if absolute else rows[name][text] for name in names]
        for one, other in combinations_with_replacement(range(len(names)), 2):
            value = between(weights[one], weights[other], by, k, alpha)
            found[text, one, other] = found[text, other, one] = value
    pair = ("attribution", "other")
    return xr.Dataset(
        {"agreement": (("batch", *pair), found), **intervals(found, pair, draws, seed)},
        coords={"batch": np.arange(len(found)), "attribution": names, "other": names},
    )


@checked
def between(
    first: Any,
    second: Any,
    by: Compared = "kendall",
    k: Annotated[float | None, Bounds(0)] = None,
    alpha: Annotated[float, Bounds(0)] = 1.0,
) -> float:
    """The agreement of two rows of numbers [token], by the measures of `agreement`; NaN where one of them has no order.

    >>> import headwater as hw
    >>> hw.analyses.between([3, 2, 1], [10, 30, 20], by="spearman")
    -0.5
    """
    x, y = (np.asarray(row, dtype=np.float64).ravel() for row in (first, second))
    if x.shape != y.shape:
        raise AnalysisError(f"rows of {len(x)} and {len(y)} tokens can not be compared")
    if by == "top_k":
        return _top_k(x, y, k)
    # scipy would give NaN as well, with a warning
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    if by == "tau_ap_b":
        return (_precision_above(x, y) + _precision_above(y, x)) / 2
    options: dict[str, Any] = (
        {"weigher": lambda rank: (rank + 1.0) ** -alpha} if by == "weighted_kendall" else {}
    )
    return float(OF_SCIPY[by](x, y, **options).statistic)


def _precision_above(x: np.ndarray, y: np.ndarray) -> float:
    """2·mean - 1 of the part of the items above each one in y that x puts above it too; the first have none above."""
    above = y[:, None] < y
    count = above.sum(1)
    shared = (above & (x[:, None] < x)).sum(1)
    return float(2 * (shared[count > 0] / count[count > 0]).mean() - 1)


def _top_k(x: np.ndarray, y: np.ndarray, k: float | None) -> float:
    """1 - 2·penalty/#pairs over the pairs of an item high in x and an item high in y."""
    k = float(min(np.count_nonzero(x), np.count_nonzero(y))) if k is None else k
    count = max(int(k * len(x)), 1) if 0 < k < 1 else int(k)
    # equal weights share a bucket; buckets are counted from the largest weight
    ranks = [np.unique(-row, return_inverse=True)[1] for row in (x, y)]
    high_x, high_y = (rank < count for rank in ranks)
    pairs = np.triu(high_x[:, None] & high_y | high_y[:, None] & high_x, 1)
    if not pairs.any():
        return float("nan")
    in_x, in_y = (np.sign(rank[:, None] - rank) for rank in ranks)
    penalty = np.where(in_x * in_y < 0, 1.0, np.where((in_x == 0) != (in_y == 0), 0.5, 0.0))
    return float(1 - 2 * penalty[pairs].sum() / pairs.sum())
