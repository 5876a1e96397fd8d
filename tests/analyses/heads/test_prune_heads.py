"""Pruning curves against gates set by hand, and orders that are known.

Mutations seen to fail: the most important head first, groups ranked by their first head, granularity not handed on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError, ModelError

TEXTS = ["w5 w9 w31 w4", "w8 w7 w12 w40", "w3 w22 w9", "w44 w6 w5 w17"]


def test_the_curve_is_that_of_the_heads_removed(pairs: Callable) -> None:
    model = pairs("llama").model
    found = analyses.prune_heads(model, TEXTS, step=0.3, controls=2, draws=20, unit="head")
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


def test_whole_groups_go_where_queries_share_keys(pairs: Callable) -> None:
    """The default under grouped queries: what goes can be cut out of the weights at every step."""
    model = pairs("llama").model
    found = analyses.prune_heads(model, TEXTS, step=0.34, controls=2, draws=5)
    assert found.heads_left.values.tolist() == [12, 8, 4, 0]
    importance = analyses.head_importance(model, TEXTS, normalise="layer").values.reshape(3, 2, 2).sum(-1)
    groups = np.argsort(importance.ravel(), kind="stable")
    heads = [f"{n // 2}.{2 * (n % 2) + of}" for n in groups for of in (0, 1)]
    assert found.order.values.tolist() == heads
    for place, count in enumerate((0, 4, 8, 12)):
        smaller = hw.load(hw.remove_heads(model, heads[:count]))
        expected = [float(smaller.loss(text)) for text in ids(TEXTS)]
        np.testing.assert_allclose(found.per_example[:, place], expected, rtol=1e-4)
        assert (found.removed[place].values.reshape(3, 2, 2).sum(-1) % 2 == 0).all()
    again = analyses.prune_heads(model, TEXTS, step=0.34, controls=0, draws=5, recompute=True)
    assert again.heads_left.values.tolist() == [12, 8, 4, 0]
    alone = analyses.prune_heads(pairs("gpt2").model, TEXTS, step=0.25, controls=0, draws=5)
    assert alone.heads_left.values.tolist() == [12, 9, 6, 3, 0]


def ids(texts: list[str]) -> list[Tensor]:
    return [torch.tensor([[int(word[1:]) for word in text.split()]]) for text in texts]


def test_absolute_values_per_token_order_otherwise(pairs: Callable) -> None:
    """As the released code takes them."""
    model = pairs("gpt2").model
    orders = []
    for granularity in ("token", "example"):
        found = analyses.prune_heads(
            model, TEXTS, step=1.0, controls=0, draws=5, granularity=granularity, normalise=None
        )
        importance = analyses.head_importance(model, TEXTS, granularity=granularity)
        np.testing.assert_array_equal(found.importance, importance)
        orders.append(found.order.values.tolist())
        assert orders[-1] == [
            f"{n // 4}.{n % 4}" for n in np.argsort(importance.values.ravel(), kind="stable")
        ]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("unit", ["head", "kv_group", None])
def test_speed_is_a_number_at_every_step(pairs: Callable, unit) -> None:
    """A figure, not a promise. Of a group that is cut in part the weights keep what can not be cut."""
    model = pairs("llama").model
    found = analyses.prune_heads(model, TEXTS[:1], step=0.17, controls=0, speed=True, draws=5, unit=unit)
    assert found.random.shape == (0, 7)
    assert (found.speed > 0).all()
    with pytest.raises(ModelError, match="heads can not be removed from the weights of GptOss"):
        analyses.prune_heads(pairs("gpt_oss").model, TEXTS[:1], speed=True)
    with pytest.raises(AnalysisError, match="step=0"):
        analyses.prune_heads(model, TEXTS, step=0)
