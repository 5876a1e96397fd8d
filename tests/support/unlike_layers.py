"""Tiny random models whose layers are unlike: widths of heads, key–value heads, shared keys, several streams."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers as hf

import headwater as hw

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 8, "sliding_window": 5,
    "num_kv_shared_layers": 0,
}  # fmt: skip
TOKENS: dict[str, Any] = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
WIDE: dict[str, Any] = {"global_head_dim": 16, "hidden_size_per_layer_input": 0}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "wide": ("Gemma4", WIDE),
    "wide, one key": ("Gemma4", WIDE | {"num_global_key_value_heads": 1, "attention_k_eq_v": True}),
    "wide, shared keys": ("Gemma4", WIDE | TOKENS | {"num_kv_shared_layers": 2}),
    "streams, shared keys": (
        "Gemma3n",
        TOKENS
        | {
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
        },
    ),
}


@functools.cache
def models(name: str) -> tuple[hw.HookedModel, hf.PreTrainedModel]:
    """The model, and a copy of it that runs transformers' eager attention and knows nothing of Headwater."""
    family, more = CONFIGS[name]
    torch.manual_seed(0)
    kind = getattr(hf, f"{family}ForCausalLM")
    plain = kind._from_config(kind.config_class(**SHAPE | more), attn_implementation="eager").eval()
    with torch.no_grad():
        for path, weight in plain.named_parameters():
            if weight.dim() == 2 and "embed" not in path:
                weight.mul_(4)
    twin = copy.deepcopy(plain)
    return hw.load(plain), twin
