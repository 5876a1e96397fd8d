"""Mixers in no module of their own: in the `forward` of a block (`stacks.py`) or the model (`between_blocks.py`).

Each model is held to a run in which every attention head is silent: a position then depends on itself alone, or there
is a mixer.
"""

from __future__ import annotations

import pytest
import torch
import xarray as xr
from hybrid_models import built
from torch import nn
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import headwater as hw
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo

IDS = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))


def earlier(x):
    """Each position's vector of one position before."""
    return nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


class ShiftBefore(LlamaDecoderLayer):
    def forward(self, hidden_states, **more):
        return super().forward(hidden_states + earlier(hidden_states), **more)


class ShiftBehind(LlamaDecoderLayer):
    def forward(self, hidden_states, **more):
        output = super().forward(hidden_states, **more)
        return output + earlier(output)


class ShiftInside(LlamaDecoderLayer):
    def forward(self, hidden_states, **more):
        middle = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **more)[0]
        normed = self.post_attention_layernorm(middle)
        return middle + self.mlp(normed + earlier(normed))


class OwnConvolution(LlamaDecoderLayer):
    def forward(self, hidden_states, **more):
        output = super().forward(hidden_states, **more)
        return output + self.conv(output.mT)[..., : output.shape[1]].mT


class Halved(LlamaDecoderLayer):
    def forward(self, hidden_states, **more):
        return 0.5 * super().forward(hidden_states, **more)


class ShiftedEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + earlier(super().forward(ids))


class ShiftInModel(LlamaModel):
    def forward(self, input_ids=None, inputs_embeds=None, **more):
        x = self.embed_tokens(input_ids)
        return super().forward(inputs_embeds=x + earlier(x), **more)


class ShiftedHead(nn.Linear):
    def forward(self, x):
        return super().forward(x) + super().forward(earlier(x))


def changed(place, kind):
    hf = zoo.build("llama")
    module = hf.get_submodule(place)
    module.__class__ = kind
    if kind is OwnConvolution:
        torch.manual_seed(0)
        module.conv = nn.Conv1d(hf.config.hidden_size, hf.config.hidden_size, 3, padding=2)
    return hf


def carries(model):
    """Whether a token reaches a later position while every head is silent."""
    other = IDS.clone()
    other[0, 3] = 61
    heads = [f"{layer}.{head}" for layer in model.layers for head in range(model.n_heads)]
    with model.edit(hw.ScaleHeads(dict.fromkeys(heads, 0.0))):
        moved = (model(IDS) - model(other))[0].abs().amax(-1)
    return bool(moved[4:].max() > 1e-6)


@pytest.mark.parametrize("kind", [ShiftBefore, ShiftBehind, ShiftInside, OwnConvolution])
def test_a_block_that_mixes_in_its_own_forward_is_named(kind):
    model = hw.load(changed("model.layers.1", kind))
    assert carries(model)
    assert [(mixer.layer, mixer.path) for mixer in model.mixers] == [(1, "model.layers.1")]
    assert model.unread == (f"{kind.__name__} in layer 1 (model.layers.*)",)
    with pytest.raises(AnalysisError, match=f"{kind.__name__} in layer 1"):
        hw.analyses.rollout(model.record(IDS))


@pytest.mark.parametrize(
    ("place", "kind"),
    [("model.embed_tokens", ShiftedEmbedding), ("model", ShiftInModel), ("lm_head", ShiftedHead)],
)
def test_mixing_outside_of_the_blocks_is_named(place, kind):
    model = hw.load(changed(place, kind))
    assert carries(model)
    assert model.mixers == ()
    assert model.unread == ("LlamaForCausalLM (outside of its blocks)",)


@pytest.mark.parametrize("kind", ["ConvBertModel", "NystromformerModel"])
def test_a_convolution_beside_attention_outside_of_the_interface_is_named(kind):
    torch.manual_seed(0)
    hf = built(kind, num_hidden_layers=2, embedding_size=32)
    attention = hf.encoder.layer[1].attention.self
    model = hw.load(hf)
    assert [(mixer.layer, mixer.path) for mixer in model.mixers] == [
        (layer, f"encoder.layer.{layer}.attention.self") for layer in (0, 1)
    ]
    with pytest.raises(AnalysisError, match=type(attention).__name__):
        hw.analyses.rollout(model.record(IDS))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("XLMModel", {"emb_dim": 32, "n_heads": 4, "n_layers": 2}),  # its modules are called with a cache
        ("OpenAIGPTModel", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
        ("DebertaV2Model", {"num_hidden_layers": 2}),
    ],
)
def test_attention_outside_of_the_interface_alone_is_not_named(kind, shape):
    assert hw.load(built(kind, **shape)).unread == ()


def test_a_block_that_is_scaled_and_mixes_nothing_is_not_named():
    model = hw.load(changed("model.layers.1", Halved))
    assert not carries(model)
    assert model.unread == ()


def test_a_block_that_is_called_a_norm_is_none():
    kind = type("PreNormBlock", (LlamaDecoderLayer,), {})
    found, expected = (
        hw.analyses.norms(hw.load(hf), IDS) for hf in (changed("model.layers.1", kind), zoo.build("llama"))
    )
    xr.testing.assert_allclose(found.drop_attrs(), expected.drop_attrs())


def test_logits_of_a_block_that_mixes_inside_fall_apart_all_the_same():
    model = hw.load(changed("model.layers.1", ShiftInside))
    found = hw.analyses.direct_logit_attribution(model, IDS, answer="#11", wrong="#23")
    logits = model(IDS)[0, -1]
    torch.testing.assert_close(float(found.sum()), float(logits[11] - logits[23]), atol=1e-4, rtol=1e-4)
