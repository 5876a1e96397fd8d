"""Ranks and composition scores against the d_model × d_model circuits themselves, and planted heads.

Mutations seen to fail: keys read as queries; the stable rank not squared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import planted_models
import pytest
import torch
import transformers as hf

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError, ModelError


def matrices(model: hw.HookedModel, layer: int, head: int) -> dict[str, np.ndarray]:
    """W_QK and W_OV [d_model, d_model] of one head from the folded weights, in float64."""
    found = model.weights(layer, fold=True, expand=True)
    q, k, v, o = (w[head].double().numpy() for w in (found.W_Q, found.W_K, found.W_V, found.W_O))
    return {"qk": q @ k.T, "ov": v @ o}


@pytest.fixture(params=["gpt2", "llama", "bert"])
def model(request: pytest.FixtureRequest, pairs: Callable) -> hw.HookedModel:
    """Norm gains that are not 1."""
    plain = type(pairs(request.param).twin)(copy.deepcopy(pairs(request.param).twin.config))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "ln_1" in name or "input_layernorm" in name:
                parameter += 0.5 * torch.rand(parameter.shape, generator=generator)
    return hw.load(plain.eval())


def test_ranks_against_the_whole_circuits(model: hw.HookedModel) -> None:
    found = analyses.circuit_rank(model)
    for circuit in ("qk", "ov"):
        for layer, head in ((0, 0), (1, 3), (2, 2)):
            whole = np.linalg.svd(matrices(model, layer, head)[circuit], compute_uv=False)
            at = found.sel(circuit=circuit, layer=layer, head=head)
            np.testing.assert_allclose(at.singular_values, whole[:8], rtol=1e-5, atol=1e-7)
            assert int(at["rank"]) == 8
            assert float(at.stable_rank) == pytest.approx((whole**2).sum() / whole[0] ** 2, rel=1e-5)


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
    places at half a match) from elsewhere. So C² = 12 / (24 · 18). Ranks are the sizes of the parts."""
    model = hw.load(planted_models.induction().model)
    found = analyses.composition(model).sel(layer=0, head=1, to_layer=1, to_head=2)
    assert float(found.score.sel(composition="k")) == pytest.approx(1 / 6, rel=1e-6)
    assert (found.excess.sel(composition="k") > 5 * found.spread.sel(composition="k")).all()
    np.testing.assert_allclose(found.score.sel(composition=["q", "v"]), 0, atol=1e-6)
    ranks = analyses.circuit_rank(model).sel(layer=0)
    assert int(ranks["rank"].sel(head=1, circuit="qk")) == 23  # 24 places, the first has none before it
    assert int(ranks["rank"].sel(head=1, circuit="ov")) == 12
    assert float(ranks.stable_rank.sel(head=1, circuit="ov")) == pytest.approx(12, rel=1e-5)
    assert int(ranks["rank"].sel(head=0, circuit="qk")) == 0
    assert np.isnan(ranks.stable_rank.sel(head=0, circuit="qk"))


def test_the_random_baseline(model: hw.HookedModel) -> None:
    """Random directions overlap by 1/√d_model in root mean square, so mean² + variance is 1/d_model."""
    found = analyses.composition(model, draws=400, seed=1)
    squared = found.baseline**2 + found.spread**2
    np.testing.assert_allclose(np.sqrt(squared), 32**-0.5, rtol=0.02)
    assert found.attrs["turned"] == pytest.approx(32**-0.5)
    again = analyses.composition(model, draws=400, seed=1)
    np.testing.assert_array_equal(found.baseline, again.baseline)
    np.testing.assert_allclose(found.excess, found.score - found.baseline)


def test_what_can_not_be_read() -> None:
    tiny = hf.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, bos_token_id=0, eos_token_id=0)
    one = hw.load(hf.GPT2LMHeadModel(tiny).eval())
    assert analyses.circuit_rank(one)["rank"].shape == (2, 1, 1)
    with pytest.raises(AnalysisError, match="one layer"):
        analyses.composition(one)
    config = hf.DeepseekV3Config(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8, first_k_dense_replace=2, max_position_embeddings=16,
    )  # fmt: skip
    low_rank = hw.load(hf.DeepseekV3ForCausalLM(config).eval())
    for ask in (analyses.circuit_rank, analyses.composition):
        with pytest.raises(ModelError, match="not in a known layout"):
            ask(low_rank)
