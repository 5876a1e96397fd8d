"""TransformerLens' tools on the cache of a Headwater model: sums that are the stream, or one line that says why not."""

from __future__ import annotations

import warnings

import pytest
import torch
from bridged import MISSING
from hybrid_models import built, hybrid

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.loading import zoo

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TransformerLens' own dependencies say while they are imported
    pytest.importorskip("transformer_lens", reason=MISSING)

IDS = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))


def kept(model):
    return model.run_with_cache(IDS, names_filter=lambda name: True)[1]


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi"])
def test_what_is_taken_apart_adds_up_to_the_stream(name):
    hf = zoo.build(name)
    cache, streams = kept(hw.load(hf)), hf(input_ids=IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(cache.decompose_resid(layer=1).sum(0), streams[1], atol=1e-4, rtol=1e-4)
    heads = cache.stack_head_results(layer=1).sum(0)
    bias = getattr(cache.model.weights(0), "b_O", 0)
    if name != "gemma2":  # a norm stands between its heads and the stream
        torch.testing.assert_close(heads + bias, cache["blocks.0.hook_attn_out"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["falcon_h1", "lfm2", "qwen3_next", "nemotron_h"])
@pytest.mark.parametrize("tool", ["decompose_resid", "get_full_resid_decomposition", "stack_head_results"])
def test_sums_that_leave_mixers_out_are_refused(name, tool):
    model = hw.load(hybrid(name))
    with pytest.raises(ModelError, match=model.mixers[0].name):
        getattr(kept(model), tool)(layer=-1)


def test_a_mixer_in_the_last_block_is_below_the_end_of_the_stream():
    hf = built("Lfm2ForCausalLM", layer_types=["full_attention", "conv"] * 2, block_auto_adjust_ff_dim=False)
    model = hw.load(hf)
    assert model.cfg.n_layers == 4
    streams = kept(model).accumulated_resid(layer=-1)
    last = hf.model.embedding_norm(streams[-1])
    torch.testing.assert_close(hf.lm_head(last), hf(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_cache_that_was_changed_is_no_stream():
    cache = kept(hw.load(zoo.build("llama")))
    cache.cache_dict["blocks.0.hook_mlp_out"] = cache["blocks.0.hook_mlp_out"] * 2
    with pytest.raises(ModelError, match="do not add up"):
        cache.decompose_resid(layer=1)


@pytest.mark.parametrize("tool", ["logit_lens", "get_full_resid_decomposition"])
def test_what_only_models_of_transformer_lens_have_is_one_line(tool):
    with pytest.raises(ModelError, match="only TransformerLens"):
        getattr(kept(hw.load(zoo.build("llama"))), tool)()


def test_what_was_not_kept_is_named():
    _, cache = hw.load(zoo.build("llama")).run_with_cache(IDS, names_filter=lambda name: "mlp_out" in name)
    with pytest.raises(ModelError, match="hook_attn_out"):
        cache.decompose_resid(layer=-1)
