"""Ranks against the singular values of the d_model × d_model circuits themselves, and of planted heads.

Mutation seen to fail: the stable rank not squared.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import planted_models
import pytest
from head_circuits import low_rank, matrices, one_layer, with_norm_gains

import headwater as hw
from headwater import analyses
from headwater.lens.errors import ModelError


@pytest.fixture(params=["gpt2", "llama", "bert"])
def model(request: pytest.FixtureRequest, pairs: Callable) -> hw.HookedModel:
    return with_norm_gains(pairs(request.param).twin)


def test_ranks_against_the_whole_circuits(model: hw.HookedModel) -> None:
    found = analyses.circuit_rank(model)
    for circuit in ("qk", "ov"):
        for layer, head in ((0, 0), (1, 3), (2, 2)):
            whole = np.linalg.svd(matrices(model, layer, head)[circuit], compute_uv=False)
            at = found.sel(circuit=circuit, layer=layer, head=head)
            np.testing.assert_allclose(at.singular_values, whole[:8], rtol=1e-5, atol=1e-7)
            assert int(at["rank"]) == 8
            assert float(at.stable_rank) == pytest.approx((whole**2).sum() / whole[0] ** 2, rel=1e-5)


def test_ranks_of_planted_heads_are_the_sizes_of_their_parts() -> None:
    ranks = analyses.circuit_rank(hw.load(planted_models.induction().model)).sel(layer=0)
    assert int(ranks["rank"].sel(head=1, circuit="qk")) == 23  # 24 places, the first has none before it
    assert int(ranks["rank"].sel(head=1, circuit="ov")) == 12
    # 12 directions, less what LayerNorm takes out of them: the mean
    assert float(ranks.stable_rank.sel(head=1, circuit="ov")) == pytest.approx(12, rel=1e-2)
    assert int(ranks["rank"].sel(head=0, circuit="qk")) == 0
    assert np.isnan(ranks.stable_rank.sel(head=0, circuit="qk"))


def test_a_model_of_one_head() -> None:
    assert analyses.circuit_rank(one_layer())["rank"].shape == (2, 1, 1)


def test_ranks_of_weights_in_an_unknown_layout() -> None:
    with pytest.raises(ModelError, match="not in a known layout"):
        analyses.circuit_rank(low_rank())
