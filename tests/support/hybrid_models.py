"""Small random models whose blocks hold linear attention, state spaces or convolutions beside attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
}  # fmt: skip
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 8,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = ["linear_attention", "full_attention"] * 2
_CONV = ["conv", "full_attention"] * 2

# name → (class, configuration, blocks that hold a mixer without a map, blocks that hold attention)
HYBRIDS: dict[str, tuple[str, dict[str, Any], list[int], list[int]]] = {
    "jamba": (
        "JambaForCausalLM",
        {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
         "use_mamba_kernels": False},
        [0, 2], [1, 3],
    ),
    "bamba": ("BambaForCausalLM", {"attn_layer_indices": [1, 3], **_MAMBA2}, [0, 2], [1, 3]),
    "granite": (
        "GraniteMoeHybridForCausalLM",
        {"layer_types": ["mamba", "attention"] * 2, **_MAMBA2, "num_local_experts": 4, "num_experts_per_tok": 2,
         "shared_intermediate_size": 48},
        [0, 2], [1, 3],
    ),
    "falcon_h1": ("FalconH1ForCausalLM", {"head_dim": 8, "mamba_d_ssm": 64, **_MAMBA2}, [0, 1, 2, 3], [0, 1, 2, 3]),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {"hybrid_override_pattern": "M*-*", "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
         "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
        [0], [1, 3],
    ),
    "lfm2": ("Lfm2ForCausalLM", {"layer_types": _CONV, "block_auto_adjust_ff_dim": False}, [0, 2], [1, 3]),
    "zamba2": (
        "Zamba2ForCausalLM",
        {"mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8,
         "num_key_value_heads": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1,
         "use_mamba_kernels": False},
        [0, 1, 2, 3], [1, 3],
    ),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 64},
        [0, 2], [1, 3],
    ),
    "minimax": (
        "MiniMaxForCausalLM",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": _LINEAR},
        [0, 2], [1, 3],
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        {**_DELTA, **_EXPERTS, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
         "shared_expert_intermediate_size": 16},
        [0, 1, 2], [3],
    ),
    "qwen3_5": ("Qwen3_5ForCausalLM", {**_DELTA, "layer_types": _LINEAR}, [0, 2], [1, 3]),
    "olmo_hybrid": (
        "OlmoHybridForCausalLM", {**_DELTA, "linear_num_key_heads": 4, "layer_types": _LINEAR}, [0, 2], [1, 3],
    ),
}  # fmt: skip


def hybrid(name: str, seed: int = 0) -> PreTrainedModel:
    """The model in eval mode with eager attention; weight matrices are larger than usual."""
    kind, more, _, _ = HYBRIDS[name]
    return built(kind, seed, **more)


def remembering(model: PreTrainedModel) -> PreTrainedModel:
    """The model with slow decays: at random weights, states forget within a position."""
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("A_log", "dt_bias", "dt_proj.bias")):
                weight.fill_(-2.0)
    return model


def built(kind: str, seed: int = 0, **more: Any) -> PreTrainedModel:
    """A small model of any class of transformers."""
    torch.manual_seed(seed)
    made = getattr(transformers, kind)
    model = made._from_config(made.config_class(**{**_SHAPE, **more}), attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in key:
                weight.mul_(4)
    return model
