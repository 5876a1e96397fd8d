"""Families of the zoo that write text from left to right, with attention in every layer."""

from __future__ import annotations

from typing import Any

from headwater.lens.loading.zoo_shapes import (
    GROUPED,
    HALF,
    HEADS,
    IDS,
    LAYERS,
    NARROW,
    SHAPE,
    VOCAB,
    WIDTH,
    Family,
    without,
)  # fmt: skip

SLIDING = {"sliding_window": 5, "layer_types": HALF}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _decoder(title: str, model: str, config: dict[str, Any], **more: Any) -> Family:
    return Family(title, f"{model}ForCausalLM", "decoder", config, **more)


def _deepseek() -> dict[str, Any]:
    return SHAPE | {
        "num_key_value_heads": HEADS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
    }  # fmt: skip


def _llama4() -> dict[str, Any]:
    return NARROW | {
        "num_hidden_layers": 3, "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
        "attention_chunk_size": 6, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 0], "attn_temperature_tuning": False,
    }  # fmt: skip


FIRST: dict[str, Family] = {
    "gpt2": Family("GPT-2", "GPT2LMHeadModel", "decoder", SHAPE),
    "llama": _decoder("Llama", "Llama", GROUPED),
    "mistral": _decoder("Mistral", "Mistral", GROUPED | {"sliding_window": 5}),
    "qwen3": _decoder("Qwen3", "Qwen3", NARROW | {"use_sliding_window": True} | SLIDING),
    "gemma2": _decoder(
        "Gemma-2", "Gemma2",
        NARROW | {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": _decoder(
        "Gemma-3", "Gemma3", NARROW | {"sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": HALF},
    ),
    "gpt_neox": _decoder("GPT-NeoX", "GPTNeoX", SHAPE),
    "opt": _decoder(
        "OPT", "OPT", without(SHAPE, "intermediate_size") | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    ),
    "phi3": _decoder("Phi-3", "Phi3", GROUPED),
    "gpt_oss": _decoder(
        "GPT-OSS", "GptOss",
        NARROW | {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": HALF,
                  "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "deepseek_v3": _decoder("DeepSeek-V3", "DeepseekV3", _deepseek()),
    "llama4": _decoder("Llama-4 (text)", "Llama4", _llama4()),
}  # fmt: skip
MORE: dict[str, Family] = {
    "llama_lora": _decoder("Llama with LoRA, not merged", "Llama", GROUPED, change="lora"),
    "llama_8bit": _decoder("Llama in 8 bits", "Llama", GROUPED, change="8bit"),
    "llama_4bit": _decoder("Llama in 4 bits", "Llama", GROUPED, change="4bit"),
    "apertus": _decoder("Apertus", "Apertus", GROUPED),
    "olmo2": _decoder("OLMo-2", "Olmo2", GROUPED),
    "olmo3": _decoder("OLMo-3", "Olmo3", GROUPED | SLIDING),
    "smollm3": _decoder("SmolLM3", "SmolLM3", GROUPED | {"no_rope_layers": [1, 0]}),
    "cohere2": _decoder("Cohere-2", "Cohere2", GROUPED | SLIDING),
    "glm4": _decoder("GLM-4", "Glm4", NARROW),
    "granite": _decoder(
        "Granite", "Granite",
        GROUPED | {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 2.0,
                   "logits_scaling": 2.0},
    ),
    "starcoder2": _decoder("StarCoder2", "Starcoder2", GROUPED | {"sliding_window": 5}),
    "stablelm": _decoder("StableLM", "StableLm", GROUPED),
    "phi": _decoder("Phi", "Phi", SHAPE),
    "persimmon": _decoder("Persimmon", "Persimmon", SHAPE),
    "nemotron": _decoder("Nemotron", "Nemotron", GROUPED),
    "ernie4_5": _decoder("ERNIE 4.5", "Ernie4_5", NARROW),
    "qwen2": _decoder("Qwen2", "Qwen2", GROUPED),
    "gemma3n": _decoder(
        "Gemma-3n (text)", "Gemma3n",
        NARROW | {"num_hidden_layers": 4, "sliding_window": 6, "layer_types": HALF * 2, "laurel_rank": 4,
                  "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2,
                  "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "gemma4": _decoder(
        "Gemma-4 (text)", "Gemma4",
        NARROW | {"sliding_window": 6, "layer_types": HALF, "global_head_dim": 16, "num_global_key_value_heads": 2,
                  "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0},
    ),
    "afmoe": _decoder(
        "AFMoE", "Afmoe", NARROW | SLIDING | EXPERTS | {"num_shared_experts": 1, "num_dense_layers": 1},
    ),
    "mixtral": _decoder("Mixtral", "Mixtral", GROUPED | {"num_local_experts": 4}),
    "qwen2_moe": _decoder("Qwen2-MoE", "Qwen2Moe", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": _decoder("Qwen3-MoE", "Qwen3Moe", NARROW | EXPERTS),
    "dbrx": _decoder(
        "DBRX", "Dbrx",
        {"vocab_size": VOCAB, "d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 64, **IDS,
         "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
         "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    ),
    "bloom": _decoder(
        "BLOOM", "Bloom", {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, **IDS},
        static=False,
    ),
    "falcon": _decoder("Falcon", "Falcon", without(SHAPE, "intermediate_size"), static=False),
    "gptj": _decoder(
        "GPT-J", "GPTJ",
        {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "rotary_dim": 4,
         **IDS}, static=False,
    ),
    "gpt_neo": _decoder(
        "GPT-Neo", "GPTNeo",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "window_size": 5,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, **IDS}, static=False,
    ),
    "mpt": _decoder(
        "MPT", "Mpt",
        {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "expansion_ratio": 2,
         "max_seq_len": 64, **IDS}, static=False,
    ),
}  # fmt: skip
