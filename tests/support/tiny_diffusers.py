"""Tiny diffusion models with random weights, and a pipeline with a word-level text encoder."""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedTokenizerFast

diffusers: Any = importlib.import_module("diffusers")
WORDS = 9  # what the tiny text encoder reads


def unet(**more: Any) -> Any:
    """Two resolutions, 8 × 8 and 4 × 4, with self- and cross-attention each."""
    torch.manual_seed(0)
    blocks = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    options = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": (blocks[0],) * 2, "up_block_types": (blocks[1],) * 2, "cross_attention_dim": 16,
        "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**options, **more}).eval()


def dit() -> Any:
    """Patches of 2 × 2 of a picture of 8 × 8, conditioned on a thousand classes, as its pipeline has."""
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=4,
    ).eval()  # fmt: skip


def sd3() -> Any:
    """Joint attention, the picture in front."""
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=16,
    ).eval()  # fmt: skip


def flux() -> Any:
    """Joint attention in double and in single blocks, the words in front."""
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


def pixart() -> Any:
    """Self- and cross-attention of a transformer."""
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=16, caption_channels=12, norm_num_groups=4, use_additional_conditions=False,
    ).eval()  # fmt: skip


def autoencoder() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
    ).eval()  # fmt: skip


def tokenizer() -> Any:
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>", "dog</w>", "red</w>"]
    letters = [each for letter in "acdegort" for each in (letter, f"{letter}</w>")]
    vocab = {word: n for n, word in enumerate(dict.fromkeys([*words, *letters]))}
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
    vocab |= {piece: len(vocab) + n for n, piece in enumerate(["ca", "do", "re"])}
    kind: Any = CLIPTokenizer
    return kind(vocab=vocab, merges=merges, model_max_length=WORDS)


def pipeline() -> Any:
    """A Stable Diffusion pipeline: `pipeline("a cat", num_inference_steps=3, output_type="latent")`."""
    words = tokenizer()
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=WORDS, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    made = diffusers.StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(text).eval(), tokenizer=words, unet=unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def joint_pipeline(kind: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline of SD3, FLUX or DiT without text encoders, and the options of a call of two steps."""
    empty = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    torch.manual_seed(1)
    words = {
        f"{which}{name}": torch.randn(size)
        for which in ("", "negative_")
        for name, size in (("prompt_embeds", (1, 6, 16)), ("pooled_prompt_embeds", (1, 16)))
    }
    if kind == "dit":
        made = diffusers.DiTPipeline(
            transformer=dit(), vae=autoencoder(), scheduler=diffusers.DDIMScheduler()
        )
        words, options = {"class_labels": [3]}, {"num_inference_steps": 2, "output_type": "np"}
    elif kind == "sd3":
        more = {**empty, "text_encoder_3": None, "tokenizer_3": None}
        made = diffusers.StableDiffusion3Pipeline(
            transformer=sd3(), scheduler=flow, vae=autoencoder(), **more
        )
    else:
        made = diffusers.FluxPipeline(transformer=flux(), scheduler=flow, vae=autoencoder(), **empty)
        options["true_cfg_scale"] = 3.0
    made.set_progress_bar_config(disable=True)
    return made, {**options, **words}


def pixel_pipeline(folder: Any) -> Any:
    """A denoiser of pixels that reads words, written as the folder of a `PixelPipeline`; gives the folder."""
    torch.manual_seed(0)
    words = {word: n for n, word in enumerate(("<pad>", "<bos>", "<unk>", "a", "red", "cat", "dog"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    parts = {
        "transformer": diffusers.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=2,
            cross_attention_dim=16, caption_channels=12, sample_size=8, patch_size=2, use_additional_conditions=False,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(
            vocab_size=len(words), hidden_size=12, intermediate_size=12, projection_dim=12, num_hidden_layers=0,
            num_attention_heads=1, max_position_embeddings=6, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )),
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", model_max_length=6,
            padding_side="right",
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
    }  # fmt: skip
    for each in parts["transformer"].parameters():
        torch.nn.init.normal_(each, std=0.1)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    about = {"_class_name": "PixelPipeline", **index, "height": 4, "width": 8, "guidance_scale": 2.0}
    (folder / "model_index.json").write_text(json.dumps({**about, "num_inference_steps": 3}))
    return folder
