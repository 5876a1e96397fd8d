"""Loading leaves a model as it was, whether it opens or is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny_models
import torch
import transformers

import headwater as hw
from headwater.lens.attention.function import NAME
from headwater.lens.errors import ModelError
from headwater.lens.loading import as_it_was, opening, zoo


def exchanging():
    config = transformers.BigBirdConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, block_size=4, num_random_blocks=1, attention_type="block_sparse",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BigBirdModel(config).eval()


def test_a_model_that_exchanges_its_attention_on_a_short_text_is_refused_and_keeps_it():
    model = exchanging()
    ids = torch.randint(3, 90, (1, 96), generator=torch.Generator().manual_seed(1))
    expected = model(ids).last_hidden_state
    with pytest.raises(ModelError, match="attention_type from 'block_sparse' to 'original_full'"):
        hw.load(model)
    assert model.attention_type == "block_sparse"
    assert model(ids).last_hidden_state.equal(expected)
    model.set_attention_type("original_full")
    expected = model(ids).last_hidden_state
    torch.testing.assert_close(hw.load(model).embeddings(ids), expected, atol=2e-6, rtol=1e-4)


def test_rotary_tables_that_grew_with_a_long_text_stay():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    shape = zoo.FAMILIES["llama"].config | {"max_position_embeddings": 16, "rope_parameters": rope}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval()
    model(torch.arange(3, 43)[None])
    rotary = model.model.rotary_emb
    before, longest = rotary.inv_freq, rotary.max_seq_len_cached
    hw.load(model)
    assert rotary.inv_freq is before
    assert rotary.max_seq_len_cached == longest == 40


def everything(model):
    """The state of a small Llama as plain values."""
    attention = model.model.layers[0].self_attn
    return {
        "config": model.config.to_dict(), "generation": model.generation_config.to_dict(),
        "attribute": attention.scaling, "list": list(model.kept), "inner": dict(model.kept[1]),
        "module": model.model.layers[0].mlp, "hooks": [list(m._forward_hooks) for m in model.modules()],
        "weight": attention.q_proj.weight, "buffer": model.table.clone(), "table": model.table,
        "numpy": np.random.get_state()[1].tolist(), "python": random.getstate(),
    }  # fmt: skip


def test_whatever_a_run_changes_is_put_back():
    model = tiny_models.tiny("llama")
    model.kept = [1, {"a": 2}]
    model.register_buffer("table", torch.zeros(3), persistent=False)

    def change(module, *_):
        attention = model.model.layers[0].self_attn
        attention.scaling = attention.scaling + 0.0 if attention.scaling > 1 else 7.0
        attention.new = object()
        attention.q_proj.weight = torch.nn.Parameter(attention.q_proj.weight.detach() * 1.0)
        model.model.layers[0].mlp = torch.nn.Identity()
        model.config.rope_parameters["rope_theta"] = 5.0
        model.generation_config.temperature = 0.5
        model.kept.append(3)
        model.kept[1]["a"] = 5
        model.table += 1
        np.random.rand()
        random.random()
        torch.rand(1)

    before, numbers = everything(model), torch.get_rng_state()
    handle = model.register_forward_pre_hook(change)
    hw.load(model)
    handle.remove()
    after = everything(model)
    for name, value in before.items():
        same = value.equal(after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, name
    assert after["weight"] is before["weight"]
    assert after["table"] is before["table"]
    assert not hasattr(model.model.layers[0].self_attn, "new")
    assert torch.get_rng_state().equal(numbers)


def test_a_model_that_writes_into_its_weights_is_refused():
    model = tiny_models.tiny("llama")
    model.register_forward_pre_hook(lambda *_: (model.lm_head.weight.detach().mul_(1.0), None)[1])
    with pytest.raises(ModelError, match=r"LlamaForCausalLM writes into lm_head\.weight while it runs"):
        hw.load(model)


def test_after_a_refusal_the_model_has_its_own_attention_and_mode(monkeypatch):
    model = zoo.build("llava").train()
    model.model.language_model.layers[0].eval()
    modes = {path: module.training for path, module in model.named_modules()}
    monkeypatch.setattr(opening, "_check_tokenizer", lambda model: 1 / 0)
    with pytest.raises(ModelError, match="can not be read: ZeroDivisionError"):
        hw.load(model)
    configs = (model.config, model.config.text_config, model.config.vision_config)
    assert [config._attn_implementation for config in configs] == ["eager"] * 3
    assert {path: module.training for path, module in model.named_modules()} == modes
    monkeypatch.undo()
    hw.load(model)
    assert [config._attn_implementation for config in configs] == [NAME] * 3
    assert not model.training


def test_large_buffers_are_watched_and_not_copied(monkeypatch):
    monkeypatch.setattr(as_it_was, "MOST_COPIED", 2)
    model = tiny_models.tiny("llama")
    model.register_buffer("table", torch.zeros(3))
    hw.load(model)
    model.register_forward_pre_hook(lambda *_: (model.table.add_(1), None)[1])
    with pytest.raises(ModelError, match="writes into table while it runs"):
        hw.load(model)
