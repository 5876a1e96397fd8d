"""Agreement against correlations counted pair by pair, and against the methods' own results.

Mutations seen to fail: ties counted as agreement in top-k, buckets counted as items, signed rows compared by size,
weighted Kendall without its weights, answers given to texts by their place in a batch, a bootstrap that never redraws.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from headwater.analyses.tokens.agreement import agreement, between
from headwater.analyses.tokens.blank_out import blank_out
from headwater.analyses.tokens.rollout import rollout
from headwater.lens.errors import AnalysisError


def rows(seed: int, size: int = 9, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    pair = random.normal(size=(2, size))
    return tuple(np.round(pair, 0 if ties else 8))


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """τ-b: concordant less discordant pairs over the geometric mean of the pairs each list orders."""
    score = untied_x = untied_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        score, untied_x, untied_y = score + a * b, untied_x + abs(a), untied_y + abs(b)
    return score / np.sqrt(untied_x * untied_y)


def weighted(x: np.ndarray, y: np.ndarray, alpha: float) -> float:
    """Additive weights of the ranks from the largest, by x and by y, averaged; no ties."""

    def by(order: np.ndarray) -> float:
        rank = np.argsort(np.argsort(-order))
        total = signed = 0.0
        for i, j in itertools.combinations(range(len(x)), 2):
            weight = (rank[i] + 1.0) ** -alpha + (rank[j] + 1.0) ** -alpha
            total += weight
            signed += weight * np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
        return signed / total

    return (by(x) + by(y)) / 2


def top_k(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """Pairs of an item in the first k buckets of one list and an item in those of the other, penalised one by one."""
    high = [set(np.flatnonzero(np.isin(row, np.sort(np.unique(row))[::-1][:k]))) for row in (x, y)]
    pairs = {frozenset((i, j)) for i in high[0] for j in high[1] if i != j}
    penalty = 0.0
    for i, j in map(tuple, pairs):
        a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        penalty += 1.0 if a * b < 0 else 0.5 if (a == 0) != (b == 0) else 0.0
    return 1 - 2 * penalty / len(pairs) if pairs else np.nan


@pytest.mark.parametrize("seed", range(8))
def test_correlations_by_hand(seed: int) -> None:
    x, y = rows(seed)
    assert between(x, y) == pytest.approx(kendall(x, y))
    ranks = [np.array([(np.sum(row < v) + np.sum(row <= v) - 1) / 2 for v in row]) for row in (x, y)]
    assert between(x, y, "spearman") == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert between(x, y, "pearson") == pytest.approx(np.corrcoef(x, y)[0, 1])
    for k in (1, 2, 3, 9):
        assert between(x, y, "top_k", k) == pytest.approx(top_k(x, y, k), nan_ok=True)
    x, y = rows(seed, ties=False)
    for alpha in (0.5, 1.0, 2.0):
        assert between(x, y, "weighted_kendall", alpha=alpha) == pytest.approx(weighted(x, y, alpha))
    assert between(x, y, "top_k", 9) == pytest.approx(kendall(x, y))  # the whole list without ties


def precision_above(x: np.ndarray, y: np.ndarray) -> float:
    """Of each item that something stands above in y: the part of these that x puts above it too."""
    parts = []
    for i in range(len(y)):
        above = [j for j in range(len(y)) if y[j] > y[i]]
        if above:
            parts.append(sum(x[j] > x[i] for j in above) / len(above))
    return 2 * sum(parts) / len(parts) - 1


def test_average_precision_correlation_with_ties() -> None:
    draw = np.random.default_rng(0)
    for size in (3, 8, 20):
        x, y = draw.integers(0, 6, (2, size)).astype(float)
        expected = (precision_above(x, y) + precision_above(y, x)) / 2
        assert between(x, y, "tau_ap_b") == pytest.approx(expected)
    assert between([3, 2, 1], [30, 20, 10], "tau_ap_b") == 1
    assert between([3, 2, 1], [10, 20, 30], "tau_ap_b") == -1
    # an exchange at the top costs more than one at the bottom
    top, bottom = (between([4, 3, 2, 1], other, "tau_ap_b") for other in ([3, 4, 2, 1], [4, 3, 1, 2]))
    assert top < bottom
    assert np.isnan(between([1, 1], [1, 2], "tau_ap_b"))


def test_closed_forms_of_top_k() -> None:
    up = np.arange(1.0, 11)
    assert between(up, up, "top_k", 3) == 1
    assert between(up, -up, "top_k", 10) == -1
    assert between(up, up, "top_k", 0.05) != between(up, up, "top_k", 0.2)  # one item has no pair
    assert np.isnan(between(up, up, "top_k", 0.05))
    # items 0, 1 tie in one list and not in the other: half a penalty for the only pair
    assert between([2, 2, 1], [3, 2, 1], "top_k", 2) == pytest.approx(1 - 2 * 0.5 / 3)
    fewer = between([3, 0, 0, 1], [3, 2, 0, 4], "top_k")  # two non-zero weights in the first list
    assert fewer == top_k(np.array([3, 0, 0, 1]), np.array([3, 2, 0, 4]), 2)


def test_rows_without_an_order() -> None:
    for by in ("kendall", "spearman", "pearson", "weighted_kendall"):
        assert np.isnan(between([1, 1, 1], [1, 2, 3], by))
        assert np.isnan(between([1], [2], by))
    with pytest.raises(AnalysisError, match="rows of 2 and 3 tokens"):
        between([1, 2], [1, 2, 3])


def test_methods_on_texts_of_unequal_length(pairs: Callable, batch) -> None:
    model = pairs("llama").model
    tokens = model.to_tokens(*batch)
    found = agreement(model, tokens, methods=["rollout", "blank_out"], answer="w9", draws=200)
    record = model.record(tokens)
    rolled, blanks = rollout(record).values[:, 0], blank_out(model, tokens, answer="w9").values
    for row, real in enumerate(batch[1].bool().numpy()):
        expected = kendall(rolled[row][real], blanks[row][real])
        assert found.agreement.values[row, 0, 1] == pytest.approx(expected, abs=0.06)
        assert found.agreement.values[row, 1, 0] == found.agreement.values[row, 0, 1]
    np.testing.assert_allclose(found.agreement.values[:, [0, 1], [0, 1]], 1)
    np.testing.assert_allclose(found["mean"].values, found.agreement.values.mean(0))
    assert (found.low <= found["mean"]).all()
    assert (found["mean"] <= found.high).all()
    assert list(found.attribution.values) == ["rollout", "blank_out"]


def test_an_answer_stays_with_its_text(pairs: Callable) -> None:
    """Texts run in groups of equal length; the answers follow them."""
    model = pairs("gpt2").model
    tokens = model.to_tokens(["w5 w6 w7 w8", "w9 w8 w7", "w6 w5 w9 w4"])
    found = agreement(
        model, tokens, methods="blank_out rollout", answer=["w11", "w12", "w13"], by="pearson", kind="logit"
    )
    for row, text in enumerate(("w5 w6 w7 w8", "w9 w8 w7", "w6 w5 w9 w4")):
        alone = agreement(
            model, text, methods="blank_out rollout", answer=f"w{11 + row}", by="pearson", kind="logit"
        )
        np.testing.assert_allclose(found.agreement.values[row], alone.agreement.values[0], atol=1e-5)


def test_weights_of_ones_own_and_their_sign(pairs: Callable) -> None:
    model = pairs("gpt2").model
    ids = torch.arange(5, 9)[None]
    mine = {"a": [[1.0, -2.0, 3.0, -4.0]], "b": [[1.0, 2.0, 3.0, 4.0]]}
    assert agreement(model, ids, methods=mine)["mean"].values[0, 1] == pytest.approx(1)
    signed = agreement(model, ids, methods=mine, absolute=False)["mean"].values[0, 1]
    assert signed == pytest.approx(kendall(*(np.array(v[0]) for v in mine.values())))
    assert np.isnan(agreement(model, ids, methods=mine).low.values).all()  # one text has no interval


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": "rolout"}, "did you mean 'rollout'"),
        ({"methods": ""}, "no method is named"),
        ({"methods": "rollout rollout"}, "named twice"),
        ({"methods": {"a": [[1.0]]}}, r"\(1, 4\), got \(1, 1\)"),
        ({"methods": {"a": [[1.0, 2.0, np.nan, 1.0]]}}, "no weight for token 2 of text 0"),
        ({"by": "cosine"}, "kendall, spearman"),
    ],
)
def test_refusals(pairs: Callable, settings: dict, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        agreement(pairs("gpt2").model, torch.arange(5, 9)[None], **settings)
