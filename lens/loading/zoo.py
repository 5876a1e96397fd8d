"""Small random models, one per architecture, built from a configuration: no network, no files.

`headwater doctor --models` and the tests run on them. Each has two or three layers of four heads (two key–value heads
in families with grouped queries), sliding windows shorter than the prompts, and weights so large that attention is far
from uniform. They exercise the code of an architecture; they say nothing about trained models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCAB, LAYERS, HEADS, WIDTH = 97, 2, 4, 32
IMAGE, PATCH, IMAGE_TOKEN = 12, 4, 90  # pixels per side of an image and of a patch; the token id of a patch
MELS, FRAMES = 8, 20  # Whisper halves the frames
# factor on the weight matrices; 4 in all other families
LOUDER = {"t5": 1.0, "clip": 2.0, "clip_vision": 2.0, "clip_text": 2.0}
QUIET = ("embed", "wte", "shared", "relative")  # embedding tables, which are not scaled
_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 48, "max_position_embeddings": 64, **_IDS,
}  # fmt: skip
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_NARROW = _GROUPED | {"head_dim": 8}
_VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 48,
    "image_size": IMAGE, "patch_size": PATCH,
}  # fmt: skip
_ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2, **_IDS,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One architecture: the transformers class, the fields of its configuration, and its kind of input.

    `kind` is "decoder", "encoder" (text), "seq2seq", "speech", "image", "pair" (image and text towers) or "chat"
    (images inside a text). `static`: whether the family supports generation with a static cache.
    """

    title: str
    model: str
    kind: str
    config: dict[str, Any]
    static: bool = True


def _towers() -> dict[str, Any]:
    text = {k: v for k, v in _SHAPE.items() if k != "max_position_embeddings"} | {
        "max_position_embeddings": 32
    }
    return {"text_config": text, "vision_config": _VISION, "projection_dim": 16}


def _llava() -> dict[str, Any]:
    return {
        "text_config": _GROUPED | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1,
    }  # fmt: skip


def _deepseek() -> dict[str, Any]:
    return _SHAPE | {
        "num_key_value_heads": HEADS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
    }  # fmt: skip


def _llama4() -> dict[str, Any]:
    return _NARROW | {
        "num_hidden_layers": 3, "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
        "attention_chunk_size": 6, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2, "no_rope_layers": [1, 1, 0], "attn_temperature_tuning": False,
    }  # fmt: skip


_HALF = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT-2", "GPT2LMHeadModel", "decoder", _SHAPE),
    "llama": Family("Llama", "LlamaForCausalLM", "decoder", _GROUPED),
    "mistral": Family("Mistral", "MistralForCausalLM", "decoder", _GROUPED | {"sliding_window": 5}),
    "qwen3": Family(
        "Qwen3", "Qwen3ForCausalLM", "decoder",
        _NARROW | {"use_sliding_window": True, "sliding_window": 5, "layer_types": _HALF},
    ),
    "gemma2": Family(
        "Gemma-2", "Gemma2ForCausalLM", "decoder",
        _NARROW | {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": Family(
        "Gemma-3", "Gemma3ForCausalLM", "decoder",
        _NARROW | {"sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": _HALF},
    ),
    "gpt_neox": Family("GPT-NeoX", "GPTNeoXForCausalLM", "decoder", _SHAPE),
    "opt": Family(
        "OPT", "OPTForCausalLM", "decoder",
        {k: v for k, v in _SHAPE.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    ),
    "phi3": Family("Phi-3", "Phi3ForCausalLM", "decoder", _GROUPED),
    "gpt_oss": Family(
        "GPT-OSS", "GptOssForCausalLM", "decoder",
        _NARROW | {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": _HALF,
                   "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "deepseek_v3": Family("DeepSeek-V3", "DeepseekV3ForCausalLM", "decoder", _deepseek()),
    "llama4": Family("Llama-4 (text)", "Llama4ForCausalLM", "decoder", _llama4()),
    "bert": Family("BERT", "BertForMaskedLM", "encoder", _SHAPE),
    "modernbert": Family(
        "ModernBERT", "ModernBertForMaskedLM", "encoder",
        _SHAPE | {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"],
                  "cls_token_id": 1, "sep_token_id": 2},
    ),
    "t5": Family(
        "T5", "T5ForConditionalGeneration", "seq2seq",
        {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": HEADS,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 0,
         "eos_token_id": 2, "pad_token_id": 0},
    ),
    "bart": Family(
        "BART", "BartForConditionalGeneration", "seq2seq", _ENCODER_DECODER | {"max_position_embeddings": 64},
    ),
    "whisper": Family(
        "Whisper", "WhisperForConditionalGeneration", "speech",
        _ENCODER_DECODER | {"num_mel_bins": MELS, "max_source_positions": FRAMES // 2, "max_target_positions": 64,
                            "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    "vit": Family("ViT", "ViTModel", "image", _VISION),
    "clip_vision": Family("CLIP image tower", "CLIPVisionModel", "image", _VISION),
    "clip_text": Family("CLIP text tower", "CLIPTextModel", "encoder", _SHAPE | {"max_position_embeddings": 32}),
    "clip": Family("CLIP", "CLIPModel", "pair", _towers()),
    "siglip": Family("SigLIP", "SiglipModel", "pair", {k: v for k, v in _towers().items() if k != "projection_dim"}),
    "llava": Family("LLaVA", "LlavaForConditionalGeneration", "chat", _llava()),
    "bloom": Family(
        "BLOOM", "BloomForCausalLM", "decoder",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, **_IDS}, static=False,
    ),
    "falcon": Family(
        "Falcon", "FalconForCausalLM", "decoder",
        {k: v for k, v in _SHAPE.items() if k != "intermediate_size"}, static=False,
    ),
    "gptj": Family(
        "GPT-J", "GPTJForCausalLM", "decoder",
        {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64, "rotary_dim": 4,
         **_IDS}, static=False,
    ),
    "gpt_neo": Family(
        "GPT-Neo", "GPTNeoForCausalLM", "decoder",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "window_size": 5,
         "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, **_IDS}, static=False,
    ),
    "mpt": Family(
        "MPT", "MptForCausalLM", "decoder",
        {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "expansion_ratio": 2,
         "max_seq_len": 64, **_IDS}, static=False,
    ),
    "deberta": Family(
        "DeBERTa-v2", "DebertaV2ForMaskedLM", "encoder",
        _SHAPE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
}  # fmt: skip


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The model of a family in eval mode, with eager attention; the same seed gives the same weights.

    Weight matrices are multiplied by `LOUDER` so that attention is far from uniform. T5 does not divide scores by
    √d_head, so its factor is 1.
    """
    family = FAMILIES[name]
    kind = getattr(transformers, family.model)
    torch.manual_seed(seed)
    model = kind._from_config(kind.config_class(**family.config), attn_implementation="eager")
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("sinks"):
                torch.nn.init.normal_(weight)
            elif weight.dim() == 2 and not any(part in key for part in QUIET):
                weight.mul_(LOUDER.get(name, 4.0))
    return model.eval()


def inputs(name: str, seed: int = 0, lengths: tuple[int, ...] = (11, 11)) -> dict[str, Tensor]:
    """Inputs for the model of a family, under transformers' names; shorter rows are padded on the right."""
    kind, generator = FAMILIES[name].kind, torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths)
    found: dict[str, Tensor] = {}
    if kind in ("image", "pair", "chat"):
        found["pixel_values"] = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    if kind == "speech":
        found["input_features"] = torch.randn(batch, MELS, FRAMES, generator=generator)
    if kind in ("seq2seq", "speech"):
        found["decoder_input_ids"] = torch.randint(3, IMAGE_TOKEN, (batch, 7), generator=generator)
    if kind not in ("image", "speech"):
        ids = torch.randint(3, IMAGE_TOKEN, (batch, longest), generator=generator)
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        if kind == "chat":
            image = torch.full((batch, (IMAGE // PATCH) ** 2), IMAGE_TOKEN)
            ids = torch.cat([ids[:, :2], image, ids[:, 2:]], 1)
            mask = torch.cat([torch.ones_like(image), mask], 1)
        found |= {"input_ids": ids, "attention_mask": mask}
    return found
