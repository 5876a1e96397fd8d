"""Norms are found by what they do (`flows.py`): whose output attention, MLP and head read, whatever they are called.

Mutations seen to fail: two norms of one output told apart by order alone; the head's norm without a look at its input.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.loading import zoo
from headwater.lens.models import blocks
from headwater.lens.models.weights import circuit_ends

# family: norms that attention and MLP read, norms on what they give, the norm that the head reads
FOUND = {
    "llama": ("input_layernorm", "post_attention_layernorm", None, None, "model.norm"),
    "apertus": ("attention_layernorm", "feedforward_layernorm", None, None, "model.norm"),
    "olmo2": (None, None, "post_attention_layernorm", "post_feedforward_layernorm", "model.norm"),
    "afmoe": ("input_layernorm", "pre_mlp_layernorm", "post_attention_layernorm", "post_mlp_layernorm", "model.norm"),
    "cohere2": ("input_layernorm", None, None, None, "model.norm"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm", None, None, "gpt_neox.final_layer_norm"),
    "lfm2": ("operator_norm", "ffn_norm", None, None, "model.embedding_norm"),
    "bloom": ("input_layernorm", "post_attention_layernorm", None, None, "transformer.ln_f"),
    "distilbert": (None, None, None, None, None),
    "modernbert": (None, "mlp_norm", None, None, None),
    "llama_lora": ("input_layernorm", "post_attention_layernorm", None, None, None),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_norms_are_found(name: str) -> None:
    model = hw.load(zoo.build(name))
    found = blocks.block(model, model.layers[0])
    around = {module: path for path, module in found.module.named_modules()}
    behind = None if found.attention_out is found.attention else found.attention_out
    after_mlp = None if found.mlp_out in (found.mlp, found.mlp_last) else found.mlp_out
    seen = [None if norm is None else around[norm] for norm in (found.norm1, found.norm2, behind, after_mlp)]
    assert seen == list(FOUND[name][:4])
    if name != "llama_lora":
        last, paths = blocks.final_norm(model), {module: path for path, module in model.hf.named_modules()}
        assert (None if last is None else paths[last]) == FOUND[name][4]


def test_a_renamed_norm_is_folded_in() -> None:
    """Apertus and Llama read their stream alike: with the norm folded in, the weights give the model's own queries."""
    for name in ("llama", "apertus"):
        hf = zoo.build(name)
        for key, weight in hf.named_parameters():
            if "norm" in key:
                weight.data.uniform_(0.5, 2.0)
        model = hw.load(hf)
        ids = torch.arange(3, 12)[None]
        _, cache = model.run_with_cache(ids, return_cache_object=False)
        stream = cache["blocks.1.hook_resid_pre"][0]
        normed = stream / (stream.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        weights = model.weights(1, fold=True)
        queries = torch.einsum("sd,hde->she", normed, weights.W_Q) + weights.b_Q
        torch.testing.assert_close(queries, cache["blocks.1.attn.hook_q"][0], rtol=1e-3, atol=1e-3)


class Doubled(nn.Module):
    """Something between the norm and the attention that no gain stands for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.inner(x)
        return normed + 0.3 * normed.roll(1, -1)


def test_what_is_no_norm_of_the_stream_is_refused() -> None:
    hf = zoo.build("llama")
    hf.model.layers[1].input_layernorm = Doubled(hf.model.layers[1].input_layernorm)
    model = hw.load(hf)
    with pytest.raises(ModelError, match=r"attention of layer 1 .* neither the stream nor one norm of it"):
        model.weights(1, fold=True)
    with pytest.raises(ModelError, match="attention of layer 1"):
        hw.analyses.circuit_rank(model)
    model.weights(1)
    model.weights(0, fold=True)


def test_a_head_behind_another_layer_has_no_unembedding() -> None:
    with pytest.raises(ModelError, match="a layer is between"):
        circuit_ends(hw.load(zoo.build("bert")))
    circuit_ends(hw.load(zoo.build("gpt2")))


def test_a_copy_has_its_own_norms() -> None:
    model = hw.load(zoo.build("llama"))
    again = copy.deepcopy(model)
    norm = blocks.block(again, 0).norm1
    assert norm is again.hf.model.layers[0].input_layernorm
    assert norm is not model.hf.model.layers[0].input_layernorm
