"""Composition scores against the d_model × d_model circuits themselves, and planted heads.

Mutation seen to fail: keys read as queries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import planted_models
import pytest
from head_circuits import low_rank, matrices, one_layer, with_norm_gains

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError, ModelError


@pytest.fixture(params=["gpt2", "llama", "bert"])
def model(request: pytest.FixtureRequest, pairs: Callable) -> hw.HookedModel:
    return with_norm_gains(pairs(request.param).twin)


def test_scores_against_the_whole_circuits(model: hw.HookedModel) -> None:
    found = analyses.composition(model, draws=3)
    for layer, head, to_layer, to_head in ((0, 1, 1, 3), (0, 0, 2, 2), (1, 3, 2, 0)):
        writes = matrices(model, layer, head)["ov"]
        reads = matrices(model, to_layer, to_head)
        for kind, circuit in (("q", reads["qk"]), ("k", reads["qk"].T), ("v", reads["ov"])):
            expected = np.linalg.norm(writes @ circuit) / (np.linalg.norm(writes) * np.linalg.norm(circuit))
            score = found.score.sel(
                composition=kind, layer=layer, head=head, to_layer=to_layer, to_head=to_head
            )
            assert float(score) == pytest.approx(expected, rel=1e-5)
    low, high = np.meshgrid(range(3), range(3), indexing="ij")
    missing = np.isnan(found.score).any(("composition", "head", "to_head")).values
    assert (missing == (low >= high)).all()


def test_the_induction_head_reads_the_previous_token_head_by_its_key() -> None:
    """0.1 writes 12 directions into both halves of the stream; 1.2 reads one half as keys: 12 parts of 12, and 6 (24
    places at half a match) from elsewhere. So C² = 12 / (24 · 18)."""
    model = hw.load(planted_models.induction().model)
    found = analyses.composition(model).sel(layer=0, head=1, to_layer=1, to_head=2)
    assert float(found.score.sel(composition="k")) == pytest.approx(1 / 6, rel=1e-6)
    assert (found.excess.sel(composition="k") > 5 * found.spread.sel(composition="k")).all()
    np.testing.assert_allclose(found.score.sel(composition=["q", "v"]), 0, atol=1e-6)


def test_the_random_baseline(model: hw.HookedModel) -> None:
    """Random directions overlap by 1/√d_model in root mean square, so mean² + variance is 1/d_model."""
    found = analyses.composition(model, draws=400, seed=1)
    squared = found.baseline**2 + found.spread**2
    np.testing.assert_allclose(np.sqrt(squared), 32**-0.5, rtol=0.02)
    assert found.attrs["turned"] == pytest.approx(32**-0.5)
    again = analyses.composition(model, draws=400, seed=1)
    np.testing.assert_array_equal(found.baseline, again.baseline)
    np.testing.assert_allclose(found.excess, found.score - found.baseline)


def test_one_layer_composes_with_nothing() -> None:
    with pytest.raises(AnalysisError, match="one layer"):
        analyses.composition(one_layer())


def test_composition_of_weights_in_an_unknown_layout() -> None:
    with pytest.raises(ModelError, match="not in a known layout"):
        analyses.composition(low_rank())
