"""Families of the zoo whose layers are attention only in part: others mix tokens by recurrence or convolution."""

from __future__ import annotations

from typing import Any

from headwater.lens.loading.zoo_decoders import EXPERTS
from headwater.lens.loading.zoo_shapes import GROUPED, NARROW, Family

LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
}  # fmt: skip
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}


def _hybrid(title: str, model: str, config: dict[str, Any], **more: Any) -> Family:
    return Family(title, f"{model}ForCausalLM", "decoder", config, **more)


HYBRIDS: dict[str, Family] = {
    "qwen3_next": _hybrid(
        "Qwen3-Next", "Qwen3Next", NARROW | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16}
    ),
    "qwen3_5": _hybrid("Qwen3.5", "Qwen3_5", NARROW | LINEAR),
    "jamba": _hybrid(
        "Jamba", "Jamba",
        GROUPED | {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1,
                   "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "bamba": _hybrid("Bamba", "Bamba", GROUPED | MAMBA | {"attn_layer_indices": [1], "mamba_n_groups": 1}),
    "granite4": _hybrid(
        "Granite-4 (hybrid)", "GraniteMoeHybrid",
        GROUPED | MAMBA | {"layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
                           "shared_intermediate_size": 16},
    ),
    "falcon_h1": _hybrid(
        "Falcon-H1", "FalconH1", NARROW | MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_n_groups": 1},
    ),
    "nemotron_h": _hybrid(
        "Nemotron-H", "NemotronH",
        NARROW | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 4,
                  "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8, "n_routed_experts": 4,
                  "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
                  "n_group": 1, "topk_group": 1},
    ),
    "lfm2": _hybrid("LFM2", "Lfm2", GROUPED | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "zamba2": _hybrid(
        "Zamba2", "Zamba2",
        GROUPED | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_d_state": 8,
                   "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 8,
                   "use_mem_rope": True},
    ),
    "recurrent_gemma": _hybrid(
        "RecurrentGemma", "RecurrentGemma",
        NARROW | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 6,
                  "block_types": ["recurrent", "recurrent", "attention"]},
    ),
    "minimax": _hybrid(
        "MiniMax", "MiniMax",
        NARROW | {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4,
                  "num_experts_per_tok": 2, "block_size": 8},
    ),
}  # fmt: skip
