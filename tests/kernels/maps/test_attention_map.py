"""Products with an attention map that is not in memory, against the dense float64 map.

Mutation seen to fail here: mean over the query group instead of per query head.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import cases, wanted
from comparison import close
from hypothesis import HealthCheck, given, settings, strategies as st

from headwater.kernels.attend import attend
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

PROFILE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PROFILE
@given(cases(), st.sampled_from([1, 3, 20]), st.booleans())
def test_products_agree_with_the_dense_map(case, columns, per_head):
    _, map = attend(case.q, case.k, case.v, case.rule, case.edits)
    weights = wanted(case).weights
    batch, heads, queries, keys = map.shape
    x = torch.randn(batch, heads, keys, columns) if per_head else torch.randn(keys, columns)
    y = torch.randn(batch, heads, queries, columns) if per_head else torch.randn(batch, queries, columns)
    close(map @ x, weights @ x.double(), 5, "P @ x")
    close(map.T @ y, weights.mT @ (y if per_head else y[:, None]).double(), 30, "P^T @ y")


def test_a_wrong_operand_is_refused_with_the_shapes():
    q = torch.randn(1, 1, 9, 4)
    _, map = attend(q, q, q, ScoreRule(1.0, Mask(9, 9)))
    assert isinstance(map, AttentionMap)
    with pytest.raises(ValueError, match=r"key=9; got \(8, 2\)"):
        map @ torch.randn(8, 2)
