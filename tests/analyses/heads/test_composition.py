"""Composition scores against the d_model × d_model circuits themselves, and planted heads.

Mutation seen to fail: keys read as queries.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import planted_models
import pytest
import torch
from head_circuits import low_rank, matrices, one_layer, with_norm_gains

import headwater as hw
from headwater import analyses
from headwater.analyses.heads import head_roles
from headwater.lens.errors import AnalysisError, ModelError
from headwater.lens.loading import zoo


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


def test_chosen_readers_have_the_scores_that_they_have_among_all() -> None:
    model = hw.load("tasks-4l")
    some, whole = analyses.composition(model, draws=2, to_layers=[1, 2]), analyses.composition(model, draws=2)
    assert some.to_layer.values.tolist() == [1, 2]
    np.testing.assert_array_equal(some.score, whole.score.sel(to_layer=[1, 2]))
    np.testing.assert_array_equal(some.baseline, whole.baseline)


def test_the_induction_head_reads_the_previous_token_head_by_its_key() -> None:
    """0.1 writes 12 directions into both halves of the stream; 1.2 reads one half as keys: 12 parts of 12, and 6 (24
    places at half a match) from elsewhere. So C² = 12 / (24 · 18), but for the mean that LayerNorm takes out."""
    model = hw.load(planted_models.induction().model)
    found = analyses.composition(model).sel(layer=0, head=1, to_layer=1, to_head=2)
    assert float(found.score.sel(composition="k")) == pytest.approx(1 / 6, rel=0.05)
    assert (found.excess.sel(composition="k") > 5 * found.spread.sel(composition="k")).all()
    np.testing.assert_allclose(found.score.sel(composition=["q", "v"]), 0, atol=0.02)


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


def test_directions_that_layer_norm_removes_do_not_count() -> None:
    """One constant more in every row that reads and every column that writes: the logits stay, and the rest too."""
    hf = zoo.build("gpt2")
    before, ids = hw.load(copy.deepcopy(hf)), torch.arange(3, 12)[None]
    with torch.no_grad():
        for block in hf.transformer.h:
            gain, projection = block.ln_1.weight, block.attn.c_attn
            constant = torch.linspace(-2, 2, projection.weight.shape[1])
            projection.weight += constant / gain[:, None]
            projection.bias -= constant * (block.ln_1.bias / gain).sum()
            block.attn.c_proj.weight += torch.linspace(-1, 1, len(block.attn.c_proj.weight))[:, None]
        hf.transformer.wte = copy.deepcopy(hf.transformer.wte)  # the head is tied to it
        hf.transformer.wte.weight += torch.linspace(-1, 1, len(hf.transformer.wte.weight))[:, None]
    after = hw.load(hf)
    torch.testing.assert_close(before(ids), after(ids), rtol=1e-4, atol=1e-4)
    for read in (
        lambda model: analyses.composition(model, draws=2).score.fillna(0).values,
        lambda model: analyses.circuit_rank(model).singular_values.values,
        lambda model: head_roles._copying(model)[0].numpy(),
    ):
        np.testing.assert_allclose(read(after), read(before), rtol=1e-3, atol=1e-4)


def test_heads_that_read_the_embedding_beside_the_stream_are_refused() -> None:
    model = hw.load(zoo.build("zamba2"))
    with pytest.raises(ModelError, match="read 64 numbers and write 32"):
        analyses.composition(model, draws=2)
    assert "read 64 numbers" in analyses.head_roles(model, length=6, sequences=2).copying
