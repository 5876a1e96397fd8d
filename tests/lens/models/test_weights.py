"""Per-head weights put together again: the heads' sum must be what the attention module gives.

They are cut out of the projections that `projections.py` finds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.models.norms import norm_gain
from headwater.lens.models.weights import circuit_ends, head_weights, layer_weights

SHARED = {"vocab_size": 61, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = SHARED | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = WIDE | {"num_key_value_heads": 2}
MODELS: dict[str, tuple[Callable[[], hf.PreTrainedConfig], str]] = {
    "gpt2": (
        lambda: hf.GPT2Config(**SHARED, n_embd=32, n_layer=2, n_head=4, n_positions=32),
        "transformer.h.1.attn",
    ),
    "llama": (lambda: hf.LlamaConfig(**GROUPED), "model.layers.1.self_attn"),
    "qwen2": (lambda: hf.Qwen2Config(**GROUPED), "model.layers.1.self_attn"),
    "gemma2": (lambda: hf.Gemma2Config(**GROUPED, head_dim=8), "model.layers.1.self_attn"),
    "phi3": (lambda: hf.Phi3Config(**GROUPED), "model.layers.1.self_attn"),
    "neox": (lambda: hf.GPTNeoXConfig(**WIDE), "gpt_neox.layers.1.attention"),
    "opt": (
        lambda: hf.OPTConfig(**WIDE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        "model.decoder.layers.1.self_attn",
    ),
    "bert": (lambda: hf.BertConfig(**WIDE), "bert.encoder.layer.1.attention.self"),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_heads_add_up_to_the_attention_output(name: str) -> None:
    """Σ_h A_h (x W_V^h) W_O^h on random input, biases put to zero, against the module's own output."""
    torch.manual_seed(2)
    make, path = MODELS[name]
    kind = hf.AutoModelForMaskedLM if name == "bert" else hf.AutoModelForCausalLM
    plain = kind.from_config(make(), attn_implementation="eager").eval()
    for parameter_name, parameter in plain.named_parameters():
        if parameter_name.endswith("bias"):
            parameter.data.zero_()
        elif "norm" in parameter_name.lower() or "ln_" in parameter_name:
            parameter.data += 0.5 * torch.rand(parameter.shape)  # gains that are not 1
    module = plain.get_submodule(path)
    kept = {}

    def keep(_, args, kwargs, output):
        kept["input"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        kept["output"] = output[0]

    handle = module.register_forward_hook(keep, with_kwargs=True)
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = plain(ids, output_attentions=True).attentions[1]
    handle.remove()
    weights = layer_weights(hw.load(plain), 1)
    assert weights.query.shape == weights.key.shape == weights.value.shape == (4, 32, 8)
    values = torch.einsum("bkd,hde->bhke", kept["input"], weights.value)
    heads = torch.einsum("bhqk,bhke->bhqe", maps, values)
    output = kept["output"]
    if name == "bert":  # this module ends before the output projection
        output = output @ plain.get_submodule(path.replace("self", "output")).dense.weight.T
    if name == "gemma2":  # the gain of the norm that follows is folded in
        output = output * (1 + plain.model.layers[1].post_attention_layernorm.weight)
    found = torch.einsum("bhqe,hed->bqd", heads, weights.output)
    torch.testing.assert_close(found, output, atol=2e-5, rtol=1e-4)


VIDEO = {"image_size": 16, "patch_size": 8, "num_frames": 4}
PICTURE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
TOWERS = {
    "VideoMAEModel": ("encoder.layer.1.attention", VIDEO, (2, 4, 3, 16, 16)),
    "BlipVisionModel": ("encoder.layers.1.self_attn", PICTURE, (2, 3, 16, 16)),
}


@pytest.mark.parametrize("name", TOWERS)
def test_heads_of_towers_add_up_too(name: str) -> None:
    """Σ_h A_h (x W_V^h + b_V^h) W_O^h + b_O on a picture, against the module's own output."""
    path, config, shape = TOWERS[name]
    kind = getattr(hf, name)
    torch.manual_seed(2)
    sizes = {name: WIDE[name] for name in WIDE if name not in SHARED} | config
    plain = kind._from_config(kind.config_class(**sizes), attn_implementation="eager").eval()
    for parameter in plain.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model, kept = hw.load(plain), {}

    def keep(_, args, kwargs, output):
        kept["input"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        kept["output"] = output if isinstance(output, torch.Tensor) else output[0]

    with plain.get_submodule(path).register_forward_hook(keep, with_kwargs=True):
        record = model.record(torch.randn(shape))
    weights, x = head_weights(model, 1), kept["input"]
    values = torch.einsum("bkm,hmd->bhkd", x, weights.W_V) + weights.b_V[:, None]
    heads = torch.einsum("bhqk,bhkd->bhqd", record.map(1).tile(slice(None), slice(None)), values)
    found = torch.einsum("bhqd,hdm->bqm", heads, weights.W_O) + weights.b_O
    torch.testing.assert_close(found, kept["output"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_scores_of_queries_and_keys(name: str) -> None:
    """Without rotary positions the maps themselves follow from W_Q and W_K."""
    torch.manual_seed(2)
    make, path = MODELS[name]
    kind = hf.AutoModelForMaskedLM if name == "bert" else hf.AutoModelForCausalLM
    plain = kind.from_config(make(), attn_implementation="eager").eval()
    kept = {}

    def keep(_, args, kwargs):
        kept["input"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    handle = plain.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
    ids = torch.randint(3, 61, (1, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = plain(ids, output_attentions=True).attentions[1]
    handle.remove()
    weights = layer_weights(hw.load(plain), 1)
    query, key = (torch.einsum("bsd,hde->bhse", kept["input"], w) for w in (weights.query, weights.key))
    scores = query @ key.mT / 8**0.5
    if name == "gpt2":
        scores = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), float("-inf"))
    torch.testing.assert_close(scores.softmax(-1), maps, atol=1e-5, rtol=1e-4)


def test_gain_however_it_is_stored() -> None:
    gain = torch.rand(8) + 0.5
    layer_norm = torch.nn.LayerNorm(8)
    layer_norm.weight.data, layer_norm.bias.data = gain, torch.randn(8)
    torch.testing.assert_close(norm_gain(layer_norm, 8), gain, atol=1e-4, rtol=1e-4)
    gemma = hf.models.gemma2.modeling_gemma2.Gemma2RMSNorm(8)
    gemma.weight.data = gain - 1
    torch.testing.assert_close(norm_gain(gemma, 8), gain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm_gain(None, 8), torch.ones(8))


def test_ends_fold_the_last_gain() -> None:
    torch.manual_seed(0)
    plain = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)).eval()
    plain.model.norm.weight.data = torch.rand(32) + 0.5
    embed, unembed = circuit_ends(hw.load(plain))
    torch.testing.assert_close(embed, plain.model.embed_tokens.weight.data)
    expected = plain.lm_head.weight.data.T * plain.model.norm.weight.data[:, None]
    torch.testing.assert_close(unembed, expected, atol=1e-5, rtol=1e-4)


def test_unknown_layouts_are_named() -> None:
    plain = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)).eval()
    model = hw.load(plain)
    with pytest.raises(ModelError, match="no attention in layer 2"):
        layer_weights(model, 2)
    attention = plain.model.layers[0].self_attn
    attention.rows = attention.q_proj
    del attention.q_proj
    with pytest.raises(ModelError, match=r"LlamaAttention \(layer 0\) are not in a known layout"):
        layer_weights(model, 0)
