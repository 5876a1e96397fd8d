"""Models that take pictures in forms of their own open from the guess alone: maps held to eager weights.

`asked.py` says what a model asks for, `floats.py` makes images, audio and series, `further.py` what
stands beside them. Seen to fail: without the form of each family, the model does not open or lacks its tower.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_families import PICTURE, TEXT, S, eager, made

import headwater as hw
from headwater.lens.samples.asked import Asked
from headwater.lens.samples.floats import floats
from headwater.lens.samples.samples import samples

GROUPED = TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 96}
LLAMA, CLIP = (
    GROUPED | {"model_type": "llama"},
    PICTURE | {"model_type": "clip_vision_model", "projection_dim": 16},
)
RESAMPLER = {
    "hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 4,
    "resampler_head_dim": 8, "num_key_value_heads": 2,
}  # fmt: skip
TILES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 4, "vision_output_dim": 64, "intermediate_layers_indices": [0],
    "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2]],
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[str, str]]]] = {
    "LlavaNextForConditionalGeneration": (
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": 90, "vision_feature_layer": -1,
         "image_grid_pinpoints": [[16, 32], [32, 16]]},
        {"text": ("text", "text"), "vision": ("image", "image")},
    ),
    "Idefics2ForConditionalGeneration": (
        {"text_config": GROUPED | {"model_type": "mistral"}, "vision_config": PICTURE, "perceiver_config": RESAMPLER,
         "image_token_id": 90},
        {"text": ("text", "text"), "vision": ("image", "image"), "perceiver_resampler": ("query", "state")},
    ),
    "IdeficsForVisionText2Text": (
        GROUPED | {"cross_layer_interval": 1, "additional_vocab_size": 0, "use_resampler": False,
                   "vision_config": PICTURE | {"embed_dim": 32}},
        {"text": ("text", "text"), "vision": ("image", "image"), "cross": ("text", "image")},
    ),
    "MllamaForConditionalGeneration": (
        {"text_config": GROUPED | {"num_hidden_layers": 3, "cross_attention_layers": [1],
                                   "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
         "vision_config": TILES, "image_token_index": 90},
        {"text": ("text", "text"), "vision": ("image", "image"), "cross": ("text", "state")},
    ),
    "Pix2StructForConditionalGeneration": (
        {"text_config": {"vocab_size": 97, "hidden_size": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
                         "decoder_start_token_id": 0},
         "vision_config": {"hidden_size": 32, "patch_embed_hidden_size": 48, "d_ff": 48, "d_kv": 8, "seq_len": 16,
                           "num_hidden_layers": 2, "num_attention_heads": 4}},
        {"decoder": ("decoder", "decoder"), "encoder": ("image", "image"), "cross": ("decoder", "image")},
    ),
    "VisionEncoderDecoderModel": (
        {"encoder": PICTURE | {"model_type": "vit"}, "decoder_start_token_id": 1, "pad_token_id": 0,
         "decoder": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4,
                     "add_cross_attention": True, "is_decoder": True}},
        {"decoder": ("decoder", "decoder"), "encoder": ("image", "image"), "cross": ("decoder", "image")},
    ),
    "PatchTSTModel": (
        {"num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4, "num_hidden_layers": 2,
         "d_model": 32, "num_attention_heads": 4, "ffn_dim": 48},
        {"series": ("series", "series")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_guess_opens_the_model_and_its_maps_are_those_of_eager_attention(name):
    config, wanted = CASES[name]
    dense = made(name, config)
    model = hw.load(copy.deepcopy(dense))
    inputs = _first_that_runs(dense)
    paths = {module: path for path, module in model.hf.named_modules()}
    for part, axes in wanted.items():
        found = model.parts[part]
        assert (found.queries, found.keys) == axes
        record = model.part(part).record(**inputs)
        for module, layer in found.modules.items():
            expected = eager(dense, paths[module], inputs) * record.valid[:, None, :, None]
            found_map = record.pattern(layer) * record.valid[:, None, :, None]
            torch.testing.assert_close(found_map, expected, atol=5e-6, rtol=1e-4)


def _first_that_runs(dense: Any) -> dict[str, Any]:
    for inputs in samples(dense):
        try:
            with torch.no_grad():
                dense(**inputs)
        except Exception:  # of any kind: this form is not the model's
            continue
        return inputs
    raise AssertionError("no sample runs")


def test_sizes_come_from_whichever_configuration_has_them():
    asked = Asked(made("VisionEncoderDecoderModel", CASES["VisionEncoderDecoderModel"][0]))
    assert asked.size == (16, 16)
    assert {given["pixel_values"].shape[-1] for given in floats(asked)} == {16}
    crops = Asked(made("LlavaNextForConditionalGeneration", CASES["LlavaNextForConditionalGeneration"][0]))
    assert crops.pinpoint() == (16, 32)


def test_a_spectrogram_is_folded_into_the_square_that_clap_reads():
    audio = {
        "window_size": 4, "num_mel_bins": 16, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4], "depths": [1],
        "num_attention_heads": [2], "patch_embeds_hidden_size": 16, "hidden_size": 16, "num_hidden_layers": 1,
    }  # fmt: skip
    config = {"text_config": TEXT | S, "audio_config": audio, "projection_dim": 16}
    assert next(floats(Asked(made("ClapModel", config))))["input_features"].shape == (2, 1, 256, 16)
