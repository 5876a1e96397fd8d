"""Families of the zoo with inputs in forms of their own: detectors, videos, crops, packed patches, series, latents.

Their inputs are those that opening a model tries by itself (samples.py).
"""

from __future__ import annotations

from typing import Any

from headwater.lens.loading.zoo_shapes import (
    ENCODER_DECODER,
    GROUPED,
    HEADS,
    IDS,
    IMAGE_TOKEN,
    LAYERS,
    SHAPE,
    VISION,
    VOCAB,
    WIDTH,
    Family,
    without,
)  # fmt: skip

SIDE = {"image_size": 16}  # pixels, four patches per side
TOWER = VISION | SIDE
WORDS = SHAPE | {"max_position_embeddings": 96}
LANGUAGE = GROUPED | {"max_position_embeddings": 96}
LLAMA = LANGUAGE | {"model_type": "llama"}
MARKED = {"image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN}
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
BOXES = without(ENCODER_DECODER, "vocab_size", "decoder_start_token_id", *IDS) | {
    "num_queries": 6, "num_labels": 3, "backbone_config": RESNET,
}  # fmt: skip
SAM = {
    "vision_config": {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "image_size": 32,
        "patch_size": 8, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48,
        "num_pos_feats": 8, "initializer_range": 0.1,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "iou_head_hidden_dim": 16, "attention_downsample_rate": 2,
    },
}  # fmt: skip
QFORMER = WORDS | {"encoder_hidden_size": WIDTH, "cross_attention_frequency": 1}
BRIDGED = {
    "vision_config": TOWER | {"initializer_range": 0.02}, "qformer_config": QFORMER, "text_config": LLAMA,
    "num_query_tokens": 4, "image_token_index": IMAGE_TOKEN,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
PACKED = {"depth": LAYERS, "hidden_size": WIDTH, "num_heads": HEADS, "patch_size": 4}
QWEN = {
    "text_config": LANGUAGE | {"rope_parameters": ROPE}, "image_token_id": IMAGE_TOKEN,
    "vision_start_token_id": 91, "vision_end_token_id": 92, "video_token_id": 93,
}  # fmt: skip
TILES = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_global_layers": 1, "attention_heads": HEADS,
    "intermediate_size": 48, "patch_size": 4, "vision_output_dim": 2 * WIDTH, "intermediate_layers_indices": [0],
    "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2]], **SIDE,
}  # fmt: skip
CROPS = {"image_grid_pinpoints": [[16, 32], [32, 16]], "vision_feature_layer": -1}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}


def _form(title: str, model: str, config: dict[str, Any], louder: float = 3.0) -> Family:
    return Family(title, model, "form", config, louder=louder)


FORMS: dict[str, Family] = {
    "detr": _form("DETR", "DetrForObjectDetection", BOXES),
    "conditional_detr": _form("Conditional DETR", "ConditionalDetrForObjectDetection", BOXES),
    "deformable_detr": _form(
        "Deformable DETR", "DeformableDetrForObjectDetection", BOXES | {"num_feature_levels": 3}
    ),
    "table_transformer": _form(
        "Table Transformer", "TableTransformerForObjectDetection",
        BOXES | {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
    ),
    "sam": _form("SAM", "SamModel", SAM),
    "segformer": _form(
        "SegFormer", "SegformerForSemanticSegmentation", STAGES | {"decoder_hidden_size": 16, "num_labels": 3}
    ),
    "pvt": _form("PVT", "PvtModel", STAGES | {"image_size": 64}),
    "swin": _form(
        "Swin", "SwinModel",
        {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4},
    ),
    "vitdet": _form("ViTDet", "VitDetModel", TOWER | {"mlp_ratio": 2}),
    "levit": _form(
        "LeViT", "LevitModel",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
         "key_dim": [4, 4, 4], "mlp_ratio": [2, 2, 2]},
    ),
    "videomae": _form("VideoMAE", "VideoMAEModel", TOWER | {"patch_size": 8, "num_frames": 4}),
    "vivit": _form("ViViT", "VivitModel", without(TOWER, "patch_size") | {"num_frames": 4, "tubelet_size": [2, 8, 8]}),
    "timesformer": _form("TimeSformer", "TimesformerModel", TOWER | {"num_frames": 2}),
    "vjepa2": _form(
        "V-JEPA 2", "VJEPA2Model",
        without(TOWER, "image_size") | {"crop_size": 16, "frames_per_clip": 4, "mlp_ratio": 2,
                                        "pred_hidden_size": WIDTH, "pred_num_attention_heads": HEADS,
                                        "pred_num_hidden_layers": LAYERS, "pred_num_mask_tokens": 2},
    ),
    "x_clip": _form(
        "X-CLIP", "XCLIPModel",
        {"text_config": WORDS, "projection_dim": WIDTH, "prompt_layers": 1, "prompt_alpha": 0.5,
         "prompt_num_attention_heads": HEADS,
         "vision_config": TOWER | {"num_frames": 2, "mit_hidden_size": WIDTH, "mit_num_attention_heads": HEADS,
                                   "mit_num_hidden_layers": 1, "mit_intermediate_size": 48}},
    ),
    "siglip2": _form(
        "SigLIP 2", "Siglip2Model",
        {"text_config": WORDS, "vision_config": without(TOWER, "image_size") | {"num_patches": 16}},
    ),
    "groupvit": _form(
        "GroupViT", "GroupViTModel",
        {"text_config": WORDS, "projection_dim": 16, "projection_intermediate_dim": 32,
         "vision_config": TOWER | {"depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0],
                                   "num_hidden_layers": 3}},
    ),
    "flava": _form(
        "FLAVA", "FlavaModel",
        {"text_config": WORDS, "image_config": TOWER, "multimodal_config": VISION, "projection_dim": 16,
         "hidden_size": WIDTH},
    ),
    "blip": _form(
        "BLIP", "BlipForConditionalGeneration",
        {"text_config": WORDS | {"encoder_hidden_size": WIDTH, "projection_dim": 16, "sep_token_id": 2},
         "vision_config": TOWER, "projection_dim": 16},
    ),
    "blip2": _form("BLIP-2", "Blip2ForConditionalGeneration", BRIDGED),
    "instructblip": _form("InstructBLIP", "InstructBlipForConditionalGeneration", BRIDGED),
    "kosmos2": _form(
        "Kosmos-2", "Kosmos2ForConditionalGeneration",
        {"text_config": {"vocab_size": VOCAB, "embed_dim": WIDTH, "layers": LAYERS, "ffn_dim": 48,
                         "attention_heads": HEADS, "max_position_embeddings": 64, "pad_token_id": 0},
         "vision_config": TOWER, "latent_query_num": 4},
    ),
    "git": _form("GIT", "GitForCausalLM", WORDS | {"vision_config": TOWER}),
    "pix2struct": _form(
        "Pix2Struct", "Pix2StructForConditionalGeneration",
        {"text_config": {"vocab_size": VOCAB, "hidden_size": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS,
                         "num_heads": HEADS, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
         "vision_config": {"hidden_size": WIDTH, "patch_embed_hidden_size": 48, "d_ff": 48, "d_kv": 8, "seq_len": 16,
                           "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}}, louder=1.0,
    ),
    "vision_encoder_decoder": _form(
        "ViT and GPT-2, encoder–decoder", "VisionEncoderDecoderModel",
        {"encoder": TOWER | {"model_type": "vit"}, "decoder_start_token_id": 1, "pad_token_id": 0,
         "decoder": {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
                     "add_cross_attention": True, "is_decoder": True}},
    ),
    "bert2bert": _form(
        "BERT and BERT, encoder–decoder", "EncoderDecoderModel",
        {"encoder": WORDS | {"model_type": "bert"}, "decoder_start_token_id": 1, "pad_token_id": 0,
         "decoder": WORDS | {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}},
    ),
    "qwen2_vl": _form(
        "Qwen2-VL", "Qwen2VLForConditionalGeneration",
        QWEN | {"vision_config": PACKED | {"embed_dim": WIDTH, "mlp_ratio": 2}},
    ),
    "qwen2_5_vl": _form(
        "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration",
        QWEN | {"vision_config": PACKED | {"intermediate_size": 48, "out_hidden_size": WIDTH, "window_size": 16,
                                           "fullatt_block_indexes": [1]}},
    ),
    "idefics": _form(
        "IDEFICS", "IdeficsForVisionText2Text",
        LANGUAGE | {"cross_layer_interval": 1, "additional_vocab_size": 0, "use_resampler": False,
                    "vision_config": TOWER | {"embed_dim": WIDTH}},
    ),
    "idefics2": _form(
        "Idefics2", "Idefics2ForConditionalGeneration",
        {"text_config": LANGUAGE | {"model_type": "mistral"}, "vision_config": TOWER, "image_token_id": IMAGE_TOKEN,
         "perceiver_config": {"hidden_size": WIDTH, "resampler_n_latents": 3, "resampler_depth": 1,
                              "resampler_n_heads": HEADS, "resampler_head_dim": 8, "num_key_value_heads": 2}},
    ),
    "idefics3": _form(
        "Idefics3", "Idefics3ForConditionalGeneration",
        {"text_config": LLAMA, "vision_config": TOWER, "scale_factor": 2, "image_token_id": IMAGE_TOKEN},
    ),
    "smolvlm": _form(
        "SmolVLM", "SmolVLMForConditionalGeneration",
        {"text_config": LLAMA, "vision_config": TOWER, "scale_factor": 2, "image_token_id": IMAGE_TOKEN},
    ),
    "llava_next": _form(
        "LLaVA-NeXT", "LlavaNextForConditionalGeneration",
        CROPS | {"text_config": LLAMA, "image_token_index": IMAGE_TOKEN,
                 "vision_config": TOWER | {"model_type": "clip_vision_model", "projection_dim": 16}},
    ),
    "llava_onevision": _form(
        "LLaVA-OneVision", "LlavaOnevisionForConditionalGeneration",
        CROPS | {"text_config": LANGUAGE | {"model_type": "qwen2"}, "image_token_index": IMAGE_TOKEN,
                 "video_token_index": 91, "vision_feature_select_strategy": "full",
                 "vision_config": TOWER | {"model_type": "siglip_vision_model"}},
    ),
    "mllama": _form(
        "Mllama", "MllamaForConditionalGeneration",
        {"text_config": LANGUAGE | {"num_hidden_layers": 3, "cross_attention_layers": [1],
                                    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
         "vision_config": TILES, "image_token_index": IMAGE_TOKEN},
    ),
    "florence2": _form(
        "Florence-2", "Florence2ForConditionalGeneration",
        {"text_config": ENCODER_DECODER | {"model_type": "bart", "max_position_embeddings": 64},
         "vision_config": {"embed_dim": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 4],
                           "num_groups": [2, 2, 2, 4], "window_size": 2, "projection_dim": WIDTH,
                           "drop_path_rate": 0.0},
         "image_token_id": IMAGE_TOKEN},
    ),
    "vilt": _form("ViLT", "ViltModel", WORDS | {"image_size": 16, "patch_size": 4}),
    "visual_bert": _form("VisualBERT", "VisualBertModel", WORDS | {"visual_embedding_dim": 12}),
    "lxmert": _form(
        "LXMERT", "LxmertModel",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 48,
         "l_layers": LAYERS, "x_layers": LAYERS, "r_layers": LAYERS, "visual_feat_dim": 12},
    ),
    "perceiver": _form(
        "Perceiver", "PerceiverForMaskedLM",
        {"num_latents": 5, "d_latents": WIDTH, "d_model": WIDTH, "num_blocks": 1, "num_self_attends_per_block": LAYERS,
         "num_self_attention_heads": HEADS, "num_cross_attention_heads": HEADS, "vocab_size": VOCAB,
         "max_position_embeddings": 24, "qk_channels": WIDTH, "v_channels": WIDTH},
    ),
    "ast": _form(
        "AST", "ASTModel",
        without(VISION, "image_size", "patch_size") | {"max_length": 32, "num_mel_bins": 16, "patch_size": 8,
                                                       "frequency_stride": 8, "time_stride": 8},
    ),
    "wavlm": _form(
        "WavLM", "WavLMModel",
        SHAPE | {"conv_dim": [16, 16], "conv_stride": [8, 8], "conv_kernel": [8, 8], "num_feat_extract_layers": 2,
                 "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    ),
    "clap": _form(
        "CLAP", "ClapModel",
        {"text_config": WORDS, "projection_dim": 16,
         "audio_config": {"window_size": 4, "num_mel_bins": 16, "spec_size": 64, "patch_size": 4, "depths": [1, 1],
                          "patch_stride": [4, 4], "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 16,
                          "hidden_size": WIDTH, "num_hidden_layers": 2}},
    ),
    "patchtst": _form(
        "PatchTST", "PatchTSTModel",
        {"num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4, "ffn_dim": 48,
         "num_hidden_layers": LAYERS, "d_model": WIDTH, "num_attention_heads": HEADS},
    ),
    "decision_transformer": _form(
        "Decision Transformer", "DecisionTransformerModel",
        {"state_dim": 5, "act_dim": 3, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "max_ep_len": 50},
    ),
    "xlnet": _form(
        "XLNet", "XLNetLMHeadModel",
        {"vocab_size": VOCAB, "d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": 48},
    ),
    "openai_gpt": _form(
        "GPT", "OpenAIGPTLMHeadModel",
        {"vocab_size": VOCAB, "n_positions": 64, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    ),
    "diffllama": _form("DiffLlama", "DiffLlamaForCausalLM", LANGUAGE),
    "longformer": _form("Longformer", "LongformerModel", SHAPE | {"attention_window": 4}),
    "reformer": _form(
        "Reformer", "ReformerModel",
        {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": HEADS, "attention_head_size": 8,
         "feed_forward_size": 48, "attn_layers": ["local", "local"], "axial_pos_embds": False, "is_decoder": True,
         "local_attn_chunk_length": 4, "max_position_embeddings": 64, "pad_token_id": 0},
    ),
    "canine": _form(
        "CANINE", "CanineModel",
        WORDS | {"num_hash_buckets": 50, "local_transformer_stride": 4, "downsampling_rate": 2,
                 "upsampling_kernel_size": 2, "attend_from_chunk_width": 4,
                 "attend_to_chunk_width": 4},
    ),
}  # fmt: skip
