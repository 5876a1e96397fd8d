"""Families of the zoo that read text in both directions, judge it, translate it, or read images and sound."""

from __future__ import annotations

from typing import Any

from headwater.lens.loading.zoo_shapes import (
    ENCODER_DECODER,
    FRAMES,
    GROUPED,
    HEADS,
    IDS,
    IMAGE,
    IMAGE_TOKEN,
    LAYERS,
    MELS,
    NARROW,
    SHAPE,
    VISION,
    VOCAB,
    WIDTH,
    Family,
    without,
)  # fmt: skip

WINDOW = NARROW | {"sliding_window": 6, "query_pre_attn_scalar": 8}
WAVES = SHAPE | {
    "conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
PREFIX = {"max_position_embeddings": 64}


def _towers() -> dict[str, Any]:
    text = SHAPE | {"max_position_embeddings": 32}
    return {"text_config": text, "vision_config": VISION, "projection_dim": 16}


def _llava() -> dict[str, Any]:
    return {
        "text_config": GROUPED | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": IMAGE_TOKEN, "vision_feature_layer": -1,
    }  # fmt: skip


def _paligemma() -> dict[str, Any]:
    return {
        "text_config": NARROW | {"model_type": "gemma"}, "projection_dim": WIDTH,
        "vision_config": VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "image_token_index": IMAGE_TOKEN, "image_token_id": IMAGE_TOKEN,
    }  # fmt: skip


ENCODERS: dict[str, Family] = {
    "bert": Family("BERT", "BertForMaskedLM", "encoder", SHAPE),
    "modernbert": Family(
        "ModernBERT", "ModernBertForMaskedLM", "encoder",
        SHAPE | {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"],
                 "cls_token_id": 1, "sep_token_id": 2},
    ),
    "roberta": Family("RoBERTa", "RobertaForMaskedLM", "encoder", SHAPE),
    "distilbert": Family(
        "DistilBERT", "DistilBertForMaskedLM", "encoder",
        {"vocab_size": VOCAB, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 48,
         "max_position_embeddings": 64, "pad_token_id": 0},
    ),
    "electra": Family("ELECTRA", "ElectraForMaskedLM", "encoder", SHAPE | {"embedding_size": WIDTH}),
    "deberta": Family(
        "DeBERTa-v2", "DebertaV2ForMaskedLM", "encoder",
        SHAPE | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "albert": Family("ALBERT", "AlbertForMaskedLM", "encoder", SHAPE | {"embedding_size": 16}),
    "bert_classifier": Family(
        "BERT, classes", "BertForSequenceClassification", "classifier", SHAPE | {"num_labels": 3}
    ),
    "bert_tokens": Family(
        "BERT, classes of tokens", "BertForTokenClassification", "classifier", SHAPE | {"num_labels": 5}
    ),
    "llama_reward": Family(
        "Llama, reward model", "LlamaForSequenceClassification", "classifier", GROUPED | {"num_labels": 1}
    ),
}  # fmt: skip
TRANSLATORS: dict[str, Family] = {
    "t5": Family(
        "T5", "T5ForConditionalGeneration", "seq2seq",
        {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": HEADS,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 0,
         "eos_token_id": 2, "pad_token_id": 0}, louder=1.0,  # T5 does not divide scores by √d_head
    ),
    "bart": Family("BART", "BartForConditionalGeneration", "seq2seq", ENCODER_DECODER | PREFIX),
    "mbart": Family("mBART", "MBartForConditionalGeneration", "seq2seq", ENCODER_DECODER | PREFIX),
    "pegasus": Family("Pegasus", "PegasusForConditionalGeneration", "seq2seq", ENCODER_DECODER | PREFIX),
    "marian": Family("Marian", "MarianMTModel", "seq2seq", ENCODER_DECODER | PREFIX),
    "t5gemma": Family(
        "T5Gemma", "T5GemmaForConditionalGeneration", "seq2seq",
        {"encoder": WINDOW, "decoder": WINDOW, "vocab_size": VOCAB, **IDS},
    ),
    "whisper": Family(
        "Whisper", "WhisperForConditionalGeneration", "speech",
        ENCODER_DECODER | {"num_mel_bins": MELS, "max_source_positions": FRAMES // 2, "max_target_positions": 64,
                           "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
}  # fmt: skip
SENSES: dict[str, Family] = {
    "wav2vec2": Family("Wav2Vec2", "Wav2Vec2ForCTC", "audio", WAVES),
    "hubert": Family("HuBERT", "HubertModel", "audio", WAVES),
    "vit": Family("ViT", "ViTModel", "image", VISION),
    "vit_classifier": Family("ViT, classes", "ViTForImageClassification", "image", VISION | {"num_labels": 3}),
    "deit": Family("DeiT", "DeiTModel", "image", VISION),
    "beit": Family("BEiT", "BeitModel", "image", VISION | {"use_relative_position_bias": True}),
    "dinov2": Family("DINOv2", "Dinov2Model", "image", VISION | {"mlp_ratio": 2}),
    "dinov2_registers": Family(
        "DINOv2 with registers", "Dinov2WithRegistersModel", "image",
        VISION | {"mlp_ratio": 2, "num_register_tokens": 2},
    ),
    "dinov3": Family("DINOv3", "DINOv3ViTModel", "image", VISION | {"num_register_tokens": 2}),
    "yolos": Family(
        "YOLOS", "YolosModel", "image", VISION | {"image_size": [IMAGE, IMAGE], "num_detection_tokens": 3}
    ),
    "clip_vision": Family("CLIP image tower", "CLIPVisionModel", "image", VISION, louder=2.0),
    "clip_text": Family(
        "CLIP text tower", "CLIPTextModel", "encoder", SHAPE | {"max_position_embeddings": 32}, louder=2.0
    ),
    "clip": Family("CLIP", "CLIPModel", "pair", _towers(), louder=2.0),
    "siglip": Family("SigLIP", "SiglipModel", "pair", without(_towers(), "projection_dim")),
    "llava": Family("LLaVA", "LlavaForConditionalGeneration", "chat", _llava()),
    "paligemma": Family("PaliGemma", "PaliGemmaForConditionalGeneration", "chat", _paligemma()),
}  # fmt: skip
