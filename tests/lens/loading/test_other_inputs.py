"""Models that read pictures, videos, crops or steps in time with queries of their own: maps held to eager weights.

Seen to fail: DETR's queries counted as a decoder's text, frames taken for windows, the way back of SAM's two-way
attention taken for the way there, a copied configuration that is left on eager attention.
"""

from __future__ import annotations

import copy

import pytest
import torch
from small_families import PICTURE, TEXT, eager, made
from torch import Tensor

import headwater as hw
from headwater.lens.errors import PromptError
from headwater.lens.loading import zoo

BACKBONE = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
DETECTOR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "num_queries": 6,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_labels": 3,
    "backbone_config": BACKBONE,
}  # fmt: skip
PYRAMID = {
    "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 24, 32], "encoder_layers": 1, "num_queries": 6,
    "encoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 48,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_n_points": 2, "num_denoising": 0,
    "backbone_config": BACKBONE | {"model_type": "rt_detr_resnet"},
}  # fmt: skip
SAM = {
    "vision_config": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        "output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": 8,
        "initializer_range": 0.5,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "iou_head_hidden_dim": 16, "attention_downsample_rate": 2,
    },
}  # fmt: skip
VIDEO = PICTURE | {
    "num_frames": 2, "mit_hidden_size": 32, "mit_num_attention_heads": 4, "mit_num_hidden_layers": 1,
    "mit_intermediate_size": 48,
}  # fmt: skip


def given(*shape: int, **more: Tensor) -> dict[str, Tensor]:
    seeded = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(shape, generator=seeded), **more}


WORDS = {"input_ids": torch.arange(10).view(2, 5) + 3}
CASES = {
    "DetrForObjectDetection": (
        DETECTOR, given(2, 3, 64, 64),
        {"decoder": ("query", "query"), "encoder": ("image", "image"), "cross": ("query", "image")},
    ),
    "ConditionalDetrForObjectDetection": (
        DETECTOR, given(2, 3, 64, 96),
        {"decoder": ("query", "query"), "encoder": ("image", "image"), "cross": ("query", "image")},
    ),
    "RTDetrForObjectDetection": (
        PYRAMID, given(2, 3, 64, 64), {"decoder": ("query", "query"), "encoder": ("image", "image")},
    ),
    "SamModel": (
        SAM, given(2, 3, 32, 32),
        {"decoder": ("query", "query"), "cross": ("query", "image"),
         "cross:mask_decoder.transformer.layers.*.cross_attn_image_to_token": ("image", "query")},
    ),
    "VideoMAEModel": (
        PICTURE | {"num_frames": 4, "patch_size": 8}, given(3, 4, 3, 16, 16), {"vision": ("image", "image")},
    ),
    "XCLIPModel": (
        {"text_config": TEXT, "vision_config": VIDEO, "projection_dim": 32, "prompt_layers": 1,
         "prompt_num_attention_heads": 4},
        given(2, 2, 3, 16, 16, **WORDS),
        {"text": ("text", "text"), "vision": ("image", "image"), "mit": ("query", "query")},
    ),
    "DecisionTransformerModel": (
        {"state_dim": 5, "act_dim": 3, "hidden_size": 32, "n_layer": 2, "n_head": 4, "max_ep_len": 50},
        {"states": torch.randn(2, 4, 5), "actions": torch.randn(2, 4, 3), "rewards": torch.randn(2, 4, 1),
         "returns_to_go": torch.randn(2, 4, 1), "timesteps": torch.arange(4).expand(2, -1)},
        {"series": ("series", "series")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_maps_are_those_of_eager_attention_on_named_axes(name):
    config, inputs, wanted = CASES[name]
    dense = made(name, config)
    model = hw.load(copy.deepcopy(dense))
    paths = {module: path for path, module in model.hf.named_modules()}
    for part, axes in wanted.items():
        found = model.parts[part]
        assert (found.queries, found.keys) == axes
        record = model.part(part).record(**inputs)
        for module, layer in found.modules.items():
            expected = eager(dense, paths[module], inputs)
            torch.testing.assert_close(record.pattern(layer), expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["DetrForObjectDetection", "SamModel"])
def test_an_edit_of_cross_attention_moves_the_outputs(name):
    config, inputs, _ = CASES[name]
    model = hw.load(made(name, config))
    field = {"DetrForObjectDetection": "logits", "SamModel": "pred_masks", "XCLIPModel": "logits_per_video"}[
        name
    ]

    def output() -> Tensor:
        with torch.no_grad():
            return model.hf(**inputs)[field]

    plain, cross = output(), model.part("cross")
    with cross.edit(hw.Knockout("all", [0])):
        assert (output() - plain).abs().max() > 1e-3 * plain.abs().max()
    assert output().equal(plain)


def test_what_a_model_reads_by_sampled_points_is_named():
    model = hw.load(made("DeformableDetrForObjectDetection", DETECTOR | {"num_feature_levels": 3}))
    told = [name for name in model.unread if "sampled points" in name]
    assert any("model.decoder.layers.*.encoder_attn" in name for name in told)
    assert any("model.encoder.layers.*.self_attn" in name for name in told)


@pytest.mark.parametrize("family", ["wav2vec2", "hubert"])
def test_padding_of_a_sound_is_padding_of_its_positions(family: str) -> None:
    """The mask is of samples, and the model makes one of positions from it. Seen to fail with the mask left out."""
    plain, given = zoo.build(family), zoo.inputs(family)
    mask = torch.ones_like(given["input_values"]).long()
    mask[1, 30:] = 0
    given = {"input_values": given["input_values"] * mask, "attention_mask": mask}
    with torch.no_grad():
        out = plain(**given, output_attentions=True)
    record = hw.load(copy.deepcopy(plain)).record(**given)
    real = int(plain._get_feat_extract_output_lengths(torch.tensor(30)))
    assert record.valid.sum(1).tolist() == [record.valid.shape[1], real]
    kept = record.valid[:, None, :, None]
    for layer, wanted in enumerate(out.attentions):
        torch.testing.assert_close(record.map(layer).dense() * kept, wanted * kept, atol=1e-5, rtol=1e-4)


def test_a_mask_of_patches() -> None:
    plain, given = zoo.build("vit"), zoo.inputs("vit")
    mask = torch.tensor([[1] * 10, [1] * 7 + [0] * 3])
    with torch.no_grad():
        out = plain(**given, attention_mask=mask, output_attentions=True)
    record = hw.load(copy.deepcopy(plain)).record(**given, attention_mask=mask)
    assert record.valid.equal(mask.bool())
    kept = record.valid[:, None, :, None]
    for layer, wanted in enumerate(out.attentions):
        torch.testing.assert_close(record.map(layer).dense() * kept, wanted * kept, atol=1e-5, rtol=1e-4)
    with pytest.raises(PromptError, match="reads no attention_mask"):
        hw.load(zoo.build("yolos")).record(**zoo.inputs("yolos"), attention_mask=torch.ones(2, 13))
