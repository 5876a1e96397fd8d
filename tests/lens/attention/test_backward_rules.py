"""Attention under backward rules against its weights written out, and who has the rules.

Mutations seen to fail: the sink's logit not divided by the temperature, values' share given to queries and keys.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import backward_rules
from headwater.lens.errors import ModelError

LENGTH = 6


def given() -> tuple[list[Tensor], Tensor, ScoreRule]:
    torch.manual_seed(1)
    leaves = [torch.randn(2, 3, LENGTH, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    sinks = torch.randn(3, dtype=torch.float64)
    return (
        leaves,
        torch.randn(2, 3, LENGTH, 4, dtype=torch.float64),
        ScoreRule(1.7, Mask(LENGTH, LENGTH, right=0), sinks=sinks),
    )


def weights(q: Tensor, k: Tensor, sinks: Tensor, temperature: float) -> Tensor:
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    scores = (1.7 * q @ k.mT).masked_fill(hidden, -torch.inf)
    sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return (torch.cat([scores, sink], -1) / temperature).softmax(-1)[..., :-1]


@pytest.mark.parametrize("rule", ["relp", "relp_released", "gim", "attnlrp"])
def test_attention_hands_back_what_the_rule_says(rule: backward_rules.BackwardRule) -> None:
    (q, k, v), flow, score_rule = given()
    with backward_rules.following(rule):
        z, _ = backward_rules.attended(q, k, v, score_rule, (), "auto", (), False)
    found = torch.autograd.grad(z, [q, k, v], flow, materialize_grads=True)
    sinks = score_rule.sinks
    assert sinks is not None
    plain = weights(q, k, sinks, 1.0)
    torch.testing.assert_close(z, plain @ v)
    share = {"relp": (0, 1), "relp_released": (1, 1), "gim": (0.25, 0.5), "attnlrp": (0.25, 0.5)}[rule]
    into_v = plain.detach().mT @ flow * share[1]
    # the softmax's Jacobian at the temperature, times what flows into the weights
    with torch.no_grad():
        warm = weights(q, k, sinks, 2.0 if rule == "gim" else 1.0)
        into_weights = flow @ v.mT
        into_scores = warm * (into_weights - (warm * into_weights).sum(-1, keepdim=True)) * share[0] * 1.7
        expected = (into_scores @ k, into_scores.mT @ q, into_v)
    for one, told in zip(found, expected, strict=True):
        torch.testing.assert_close(one, told, rtol=1e-6, atol=1e-9)


def test_other_threads_take_the_gradient() -> None:
    found: list[object] = []
    with backward_rules.following("relp"):
        thread = threading.Thread(target=lambda: found.append(backward_rules.current()))
        thread.start()
        thread.join()
        assert backward_rules.current() is backward_rules.RULES["relp"]
    assert found == [None]
    assert backward_rules.current() is None


def test_a_temperature_is_for_the_softmax() -> None:
    (q, k, v), _, _ = given()
    other = ScoreRule(1.7, Mask(LENGTH, LENGTH, right=0), normaliser=Normaliser("sigmoid"))
    with backward_rules.following("gim"), pytest.raises(ModelError, match="sigmoid normaliser; take relp"):
        backward_rules.attended(q, k, v, other, (), "auto", (), False)
