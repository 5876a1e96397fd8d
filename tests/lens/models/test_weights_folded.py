"""`model.weights(layer)`: folded, centred and expanded weights against a forward pass written out and against a bridge.

Seen to fail when: the norm's bias is not folded; keys of a group are tiled where they are to be repeated; GPT-NeoX's
features are split into thirds; keys and values have as many heads as queries; the mean is taken over heads.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from bridged import MISSING, both, quietly, varied
from torch import Tensor, nn

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.models.weights import HeadWeights

IDS = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(3))
LAYER = 1
FAMILIES = ("gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi3")


def forward(plain: nn.Module, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """What comes into a layer's block, its maps, and what its attention module gives, from transformers alone."""
    kept = []
    handle = plain.get_submodule(path).register_forward_hook(lambda m, a, output: kept.append(output[0]))
    with torch.no_grad():
        out = plain(IDS, output_hidden_states=True, output_attentions=True)
    handle.remove()
    return out.hidden_states[LAYER], out.attentions[LAYER], kept[0]


def causal(scores: Tensor) -> Tensor:
    return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def heads_sum(normal: Tensor, maps: Tensor, weights: HeadWeights) -> Tensor:
    """Σ_h A_h (x W_V + b_V) W_O + b_O."""
    values = torch.einsum("bkd,hde->bhke", normal, weights.W_V) + weights.b_V[:, None]
    return torch.einsum("bhqe,hed->bqd", maps @ values, weights.W_O) + weights.b_O


@pytest.mark.parametrize("centre", [False, True])
def test_scores_and_outputs_of_gpt2(centre: bool) -> None:
    """Biases everywhere, LayerNorm: maps follow from W_Q and W_K of the normalised stream, the output from OV."""
    plain = varied("gpt2")
    stream, maps, output = forward(plain, f"transformer.h.{LAYER}.attn")
    weights = hw.load(plain).weights(LAYER, fold=True, centre=centre)
    normal = (stream - stream.mean(-1, keepdim=True)) / (
        stream.var(-1, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    if centre:  # the mean of what is read does not count
        normal = normal + 3.0
        output = output - output.mean(-1, keepdim=True)
    query, key = (
        torch.einsum("bsd,hde->bhse", normal, w) + b[:, None]
        for w, b in ((weights.W_Q, weights.b_Q), (weights.W_K, weights.b_K))
    )
    torch.testing.assert_close(causal(query @ key.mT / 8**0.5), maps, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(heads_sum(normal, maps, weights), output, atol=5e-5, rtol=1e-3)


def test_scores_and_outputs_of_llama() -> None:
    """RMSNorm, rotary positions, two query heads to a key–value head."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    plain = varied("llama")
    stream, maps, output = forward(plain, f"model.layers.{LAYER}.self_attn")
    weights = hw.load(plain).weights(LAYER, fold=True, expand=True)
    epsilon = plain.config.rms_norm_eps
    normal = stream / (stream.square().mean(-1, keepdim=True) + epsilon).sqrt()
    query, key = (torch.einsum("bsd,hde->bhse", normal, w) for w in (weights.W_Q, weights.W_K))
    cos, sin = plain.model.rotary_emb(stream, torch.arange(8)[None])
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    torch.testing.assert_close(causal(query @ key.mT / 8**0.5), maps, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(heads_sum(normal, maps, weights), output, atol=5e-5, rtol=1e-3)


def of_bridge(bridge: Any, field: str, like: Tensor) -> Tensor:
    """A bridge says of a bias that the model does not have that there is none; here it is zeros."""
    try:
        return quietly(getattr, bridge, field)[LAYER].reshape(like.shape)
    except AttributeError:
        if not field.startswith("b_"):
            raise
        return torch.zeros_like(like)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.skipif(find_spec("transformer_lens") is None, reason=MISSING)
def test_weights_are_a_bridges(name: str) -> None:
    plain, bridge = both(name)
    model = hw.load(plain)
    own, wide = model.weights(LAYER), model.weights(LAYER, expand=True)
    group = model.n_heads // model.n_kv_heads
    for field in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
        found = getattr(own, field)
        torch.testing.assert_close(found, of_bridge(bridge, field, found), atol=0, rtol=0)
        if field[-1] in "KV":
            expanded = found.repeat_interleave(group, 0)
            torch.testing.assert_close(getattr(wide, field), expanded, atol=0, rtol=0)


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen3", "gemma2", "gpt_oss", "phi3"]
)
@pytest.mark.skipif(find_spec("transformer_lens") is None, reason=MISSING)
def test_folded_weights_are_a_bridges(name: str) -> None:
    """Compatibility mode folds the norms and, where they are LayerNorms, centres what reads and what writes."""
    plain, bridge = both(name)
    layer_norm = name in ("gpt2", "gpt_neox", "opt")
    quietly(bridge.enable_compatibility_mode, fold_value_biases=False)
    weights = hw.load(plain).weights(LAYER, fold=True, centre=layer_norm)
    for field in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
        found = getattr(weights, field)
        expected = of_bridge(bridge, field, found)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4, msg=lambda m, f=field: f"{f}: {m}")


def test_what_can_not_be_had_is_refused() -> None:
    with pytest.raises(ModelError, match="has LlamaRMSNorm, which keeps the mean"):
        hw.load(varied("llama")).weights(0, fold=True, centre=True)
    with pytest.raises(ModelError, match="has no norm in front of its attention"):
        hw.load(varied("bert")).weights(0, fold=True, centre=True)
    with pytest.raises(ModelError, match="centre=True needs fold=True"):
        hw.load(varied("gpt2")).weights(0, centre=True)
    with pytest.raises(ModelError, match="not in a known layout"):
        hw.load(varied("deepseek_v3")).weights(0)


def test_weights_are_copies() -> None:
    model = hw.load(varied("gpt2"))
    before = model(IDS)
    for tensor in vars(model.weights(0)).values():
        tensor.zero_()
    torch.testing.assert_close(model(IDS), before, atol=0, rtol=0)
