"""Strongest keys and pooled maps against the dense map; seen to fail with cells off by one and full edge cells."""

from __future__ import annotations

import pytest
import torch
from attention_cases import cases
from hypothesis import given, settings, strategies as st
from limits import block_elements

from headwater.kernels.attend import attend
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

PROFILE = settings(max_examples=40, deadline=None)


@PROFILE
@given(cases(), st.integers(1, 5), st.sampled_from([1, 40, 2**19]))
def test_the_strongest_keys_are_those_of_the_dense_map(case, k, elements):
    with block_elements(elements):
        _, map = attend(case.q, case.k, case.v, case.rule, case.edits)
        k = min(k, map.shape[3])
        weights, columns = map.topk(k)
    dense = map.dense()
    torch.testing.assert_close(weights, dense.topk(k, -1).values, atol=1e-6, rtol=1e-5)
    assert ((columns >= 0) == (weights > 0)).all()
    named = dense.gather(-1, columns.clamp_min(0))
    torch.testing.assert_close(torch.where(columns >= 0, named, 0.0), weights, atol=1e-6, rtol=1e-5)


@PROFILE
@given(
    cases(),
    st.sampled_from([1, 2, 3, 7, 64]),
    st.sampled_from(["max", "mean"]),
    st.sampled_from([1, 40, 2**19]),
)
def test_cells_are_pooled_from_the_dense_map(case, block, how, elements):
    with block_elements(elements):
        _, map = attend(case.q, case.k, case.v, case.rule, case.edits)
        cells = map.pooled(block, how)
    dense = map.dense()
    assert cells.shape[2:] == (-(-dense.shape[2] // block), -(-dense.shape[3] // block))
    for i in range(cells.shape[2]):
        for j in range(cells.shape[3]):
            cell = dense[:, :, i * block : (i + 1) * block, j * block : (j + 1) * block].flatten(2)
            expected = cell.amax(-1) if how == "max" else cell.mean(-1)
            torch.testing.assert_close(cells[:, :, i, j], expected, atol=1e-6, rtol=1e-5)


def test_settings_out_of_range_are_refused():
    q = torch.randn(1, 1, 4, 4)
    _, map = attend(q, q, q, ScoreRule(1.0, Mask(4, 4)))
    with pytest.raises(ValueError, match="between 1 and the 4 keys; got 5"):
        map.topk(5)
    with pytest.raises(ValueError, match="at least 1 × 1"):
        map.pooled(0)
    with pytest.raises(ValueError, match="'max' or 'mean'; got 'sum'"):
        map.pooled(2, "sum")
