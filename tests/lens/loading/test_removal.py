"""Heads removed from the weights: the smaller model gives what gates of zero give.

Mutations seen to fail: output rows of the wrong heads kept; a silent layer's output weights left in.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import HeadError, ModelError
from headwater.lens.loading.removal import remove_heads


def gated(model: hw.HookedModel, heads: list[str], ids: torch.Tensor) -> torch.Tensor:
    gates = torch.ones(1, model.n_layers, model.n_heads)
    for name in heads:
        layer, head = map(int, name.split("."))
        gates[0, layer, head] = 0
    with model.gated(gates):
        return model(ids)


CHOICES = {
    "gpt2": ["0.0", "0.3", "1.0", "1.1", "1.2", "1.3", "2.2"],
    "bert": ["0.1", "1.0", "1.2", "1.3"],
    "llama": ["0.0", "0.1", "1.1", "1.3", "2.0", "2.1", "2.2", "2.3"],
    "mistral": ["0.2", "0.3"],
    "gemma2": ["1.0", "1.1", "2.0", "2.2"],
}


@pytest.mark.parametrize("name", list(CHOICES))
def test_it_gives_what_gates_of_zero_give(name: str) -> None:
    plain = tiny_models.tiny(name)
    before = sum(p.numel() for p in plain.parameters())
    model = hw.load(plain)
    ids = torch.randint(3, tiny_models.VOCAB, (2, 13), generator=torch.Generator().manual_seed(1))
    smaller = remove_heads(model, CHOICES[name])
    with torch.no_grad():
        found = smaller(input_ids=ids).logits
    torch.testing.assert_close(found, gated(model, CHOICES[name], ids), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in smaller.parameters()) < before
    assert sum(p.numel() for p in model.hf.parameters()) == before
    if name != "bert":
        with model.edit(hw.ScaleHeads(dict.fromkeys(CHOICES[name], 0.0))):
            wanted = model.generate(ids, max_new_tokens=5)
        text = smaller.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
        assert torch.equal(text[:, : wanted.shape[1]], wanted)


def test_sizes() -> None:
    """Two of four heads of 8: half of the projections; of two key–value heads, one."""
    model = hw.load(tiny_models.tiny("llama"))
    attention = remove_heads(model, ["1.0", "1.1"]).model.layers[1].self_attn
    assert attention.q_proj.weight.shape == (16, 32)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (8, 32)
    assert attention.o_proj.weight.shape == (32, 16)
    assert attention.num_key_value_groups == 2
    fused = remove_heads(hw.load(tiny_models.tiny("gpt2")), ["0.1"]).transformer.h[0].attn
    assert fused.c_attn.weight.shape == (32, 72)
    assert fused.c_attn.bias.shape == (72,)
    assert fused.c_proj.weight.shape == (24, 32)


def test_refusals() -> None:
    model = hw.load(tiny_models.tiny("llama"))
    with pytest.raises(ModelError, match="would keep 1, 2 query heads of its 2 key–value heads"):
        remove_heads(model, ["0.0"])
    with pytest.raises(HeadError, match=r"9\.0"):
        remove_heads(model, ["9.0"])
    with pytest.raises(ModelError, match="GptOssForCausalLM"):
        remove_heads(hw.load(tiny_models.tiny("gptoss")), ["0.0", "0.1"])
