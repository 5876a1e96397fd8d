"""Pruning curves against gates set by hand, and orders that are known.

Mutation seen to fail: the most important head first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError, ModelError

TEXTS = ["w5 w9 w31 w4", "w8 w7 w12 w40", "w3 w22 w9", "w44 w6 w5 w17"]


def test_the_curve_is_that_of_the_heads_removed(pairs: Callable) -> None:
    model = pairs("llama").model
    found = analyses.prune_heads(model, TEXTS, step=0.3, controls=2, draws=20)
    np.testing.assert_allclose(found.fraction, [0, 0.3, 0.6, 0.9, 1])
    assert found.heads_left.values.tolist() == [12, 8, 5, 1, 0]
    importance = analyses.head_importance(model, TEXTS, normalise="layer")
    ranks = np.argsort(importance.values.ravel(), kind="stable")
    assert found.order.values.tolist() == [f"{n // 4}.{n % 4}" for n in ranks]
    for place, count in enumerate((0, 4, 7, 11, 12)):
        with model.edit(hw.ScaleHeads({f"{n // 4}.{n % 4}": 0.0 for n in ranks[:count]})):
            expected = [float(model.loss(text)) for text in TEXTS]
        np.testing.assert_allclose(found.per_example[:, place], expected, rtol=1e-5)
        assert float(found["measure"][place]) == pytest.approx(np.mean(expected), rel=1e-5)
        assert found.removed[place].sum() == count
    np.testing.assert_allclose(found.random[:, [0, -1]], [found["measure"].values[[0, -1]]] * 2)
    assert not np.allclose(found.random[0, 2], found.random[1, 2])


def test_order_computed_again(pairs: Callable) -> None:
    """After each step the heads that are left are ranked as `head_importance` ranks them under that edit."""
    model = pairs("gpt2").model
    found = analyses.prune_heads(model, TEXTS, step=0.25, importance="ablation", recompute=True, draws=5)
    order = found.order.values.tolist()
    assert len(set(order)) == 12
    for start in (0, 3, 6, 9):
        with model.edit(hw.ScaleHeads(dict.fromkeys(order[:start], 0.0))):
            scores = analyses.head_importance(model, TEXTS, how="ablation", normalise="layer")
        left = [f"{n // 4}.{n % 4}" for n in np.argsort(scores.values.ravel(), kind="stable")]
        assert order[start : start + 3] == [name for name in left if name not in order[:start]][:3]
    once = analyses.prune_heads(model, TEXTS, step=0.25, importance="ablation", draws=5)
    assert once.order.values.tolist() != order


def test_a_measure_that_one_head_carries(pairs: Callable) -> None:
    """Only head 2.3 has an effect, and without it the loss is smaller: it goes first. Then a measure of logits."""
    model = pairs("gpt2").model

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return model.head_outputs(tokens)[:, 2, 3, -1].norm(dim=-1) + 0 * logits[:, -1, 0]

    found = analyses.prune_heads(
        model, TEXTS, loss=loss, importance="ablation", step=0.5, normalise=None, draws=5
    )
    assert found.order[0] == "2.3"
    assert (found.per_example[:, 1:] == 0).all()
    shares = analyses.prune_heads(model, TEXTS, measure=lambda logits: logits[:, -1, 5], step=0.5, draws=5)
    expected = np.mean([float(model(text)[0, -1, 5]) for text in TEXTS])
    assert float(shares["measure"][0]) == pytest.approx(expected, abs=1e-5)


def test_speed_where_heads_can_be_removed(pairs: Callable) -> None:
    """A figure, not a promise: one where the weights can be cut, and missing exactly where they can not."""
    model = pairs("llama").model
    found = analyses.prune_heads(model, TEXTS[:1], step=0.34, controls=0, speed=True, draws=5)
    assert found.random.shape == (0, 4)
    order = found.order.values.tolist()
    for left, speed in zip(found.heads_left.values, found.speed.values, strict=True):
        try:
            hw.remove_heads(model, order[: 12 - left])
        except ModelError:
            assert np.isnan(speed)
        else:
            assert speed > 0
    with pytest.raises(AnalysisError, match="step=0"):
        analyses.prune_heads(model, TEXTS, step=0)
