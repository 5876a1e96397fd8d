"""A learned key and value are one more key that every query sees, and a model's normaliser gives way to an edit's.

Mutations seen to fail: the learned value added unweighted, the scale left out of the learned key's logit.
"""

from __future__ import annotations

import pytest
import torch
from comparison import near

from headwater.kernels.attend import attend
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.own_rule import OwnRule
from headwater.lens.errors import ModelError

MASK = Mask(5, 5, right=0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def test_a_learned_key_is_one_more_key():
    q, k, v = drawn(2, 3, 5, 4), drawn(2, 3, 5, 4) / 2, drawn(2, 3, 5, 4) * 2
    own = OwnRule(None, drawn(3, 4), drawn(3, 4) * 3)
    rule = own.applied(q, ScoreRule(0.5, MASK))
    z, map = attend(q, k, v, rule)
    keys, values = (torch.cat([x.expand(2, 3, 1, 4), y], 2) for x, y in (
        (own.key[:, None], k), (own.value[:, None], v)))  # fmt: skip
    hidden = torch.ones(5, 6).triu(2) > 0
    weights = (0.5 * q @ keys.mT).masked_fill(hidden, -torch.inf).softmax(-1)
    near(own.added(z, map, rule), weights @ values, 1e-6)
    near(map.dense(), weights[..., 1:], 1e-6)


def test_an_edits_normaliser_comes_first_and_learned_sinks_do_not_go_together():
    q = drawn(1, 3, 5, 4)
    own = OwnRule(Normaliser("sigmoid", bias=-1.0))
    assert own.applied(q, ScoreRule(0.5, MASK)).normaliser == own.normaliser
    asked = Normaliser("cog")
    assert own.applied(q, ScoreRule(0.5, MASK, normaliser=asked)).normaliser == asked
    with pytest.raises(ModelError, match="has learned sinks, so it can have no learned key"):
        OwnRule(None, drawn(3, 4), drawn(3, 4)).applied(q, ScoreRule(0.5, MASK, sinks=torch.zeros(3)))
