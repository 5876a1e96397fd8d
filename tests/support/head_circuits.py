"""The circuits of a head as whole matrices, and models whose norms have gains for the weights to fold in."""

from __future__ import annotations

import copy

import numpy as np
import torch
import transformers as hf

import headwater as hw


def matrices(model: hw.HookedModel, layer: int, head: int) -> dict[str, np.ndarray]:
    """W_QK and W_OV [d_model, d_model] of one head from the folded weights, in float64.

    The mean over d_model is projected out where LayerNorm takes it out: of what GPT-2 reads, and of what GPT-2 and BERT
    write.
    """
    found = model.weights(layer, fold=True, expand=True)
    q, k, v, o = (w[head].double().numpy() for w in (found.W_Q, found.W_K, found.W_V, found.W_O))
    no_mean, family = np.eye(len(q)) - 1 / len(q), type(model.hf).__name__[:4]
    read = no_mean if family == "GPT2" else np.eye(len(q))
    written = no_mean if family in ("GPT2", "Bert") else np.eye(len(q))
    return {"qk": read @ q @ k.T @ read, "ov": read @ v @ o @ written}


def with_norm_gains(twin: hf.PreTrainedModel) -> hw.HookedModel:
    """A new model of the twin's kind whose norm gains are not 1."""
    plain = type(twin)(copy.deepcopy(twin.config))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "ln_1" in name or "input_layernorm" in name:
                parameter += 0.5 * torch.rand(parameter.shape, generator=generator)
    return hw.load(plain.eval())


def one_layer() -> hw.HookedModel:
    """A GPT-2 of one layer with one head."""
    tiny = hf.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, bos_token_id=0, eos_token_id=0)
    return hw.load(hf.GPT2LMHeadModel(tiny).eval())


def low_rank() -> hw.HookedModel:
    """A DeepSeek-V3, whose keys and values go through a narrower vector: no weights of single heads to read."""
    config = hf.DeepseekV3Config(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8, first_k_dense_replace=2, max_position_embeddings=16,
    )  # fmt: skip
    return hw.load(hf.DeepseekV3ForCausalLM(config).eval())
