"""Weights that models give by themselves, in whatever form: turned axes, stages of a pyramid, latents, joint rows.

Seen to fail: a module found by the identity of its tensor (XLNet, ViTDet), one shape taken for all layers (PVT), keys
of a pyramid taken for its queries, the second call of a shared module taken for the first (LXMERT).
"""

from __future__ import annotations

import copy

import pytest
import torch
from small_families import PICTURE, TEXT, S, eager, made

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.models.part_axes import CONSTANT

WORDS = {"input_ids": torch.arange(18).view(2, 9) + 3}
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PYRAMID = {
    "image_size": 32,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 2, 1, 1],
    "num_attention_heads": [1, 2, 2, 4],
}
PERCEIVER = {
    "num_latents": 5, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "max_position_embeddings": 9, "qk_channels": 32,
    "v_channels": 32, "vocab_size": 97,
}  # fmt: skip
CASES = {
    "XLNetLMHeadModel": (
        {"vocab_size": 97, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, WORDS, {"text": ("text", "text")},
    ),
    "ViTDet": (
        PICTURE | {"use_relative_position_embeddings": True, "mlp_ratio": 2}, {"pixel_values": IMAGE},
        {"vision": ("image", "image")},
    ),
    "TimesformerModel": (
        PICTURE | {"num_frames": 2}, {"pixel_values": torch.stack([IMAGE, IMAGE + 1], 1)},
        {"vision": ("image", "image")},
    ),
    "PvtModel": (
        PYRAMID | {"num_attention_heads": [1, 2, 2, 4]}, {"pixel_values": torch.randn(2, 3, 32, 32)},
        {"vision1": ("image", "state"), "vision2": ("image", "state"), "vision4": ("image", "image")},
    ),
    "PerceiverForMaskedLM": (
        PERCEIVER, WORDS, {"self_attends": ("query", "query"), "cross": ("query", "text")},
    ),
    "LxmertModel": (
        {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "l_layers": 1,
         "x_layers": 2, "r_layers": 1, "visual_feat_dim": 12},
        WORDS | {"visual_feats": torch.randn(2, 6, 12), "visual_pos": torch.rand(2, 6, 4)},
        {"text": ("text", "text"), "vision": ("image", "image"), "cross": ("text", "image")},
    ),
    "GitModel": (TEXT | {"vision_config": PICTURE}, WORDS | {"pixel_values": IMAGE}, {"joint": ("state", "state")}),
}  # fmt: skip
CASES["VitDetModel"] = CASES.pop("ViTDet")


@pytest.mark.parametrize("name", CASES)
def test_each_map_is_what_its_module_gives_and_can_not_be_edited(name):
    config, inputs, wanted = CASES[name]
    dense = made(name, config)
    model = hw.load(copy.deepcopy(dense))
    assert model.read_only
    paths = {module: path for path, module in model.hf.named_modules()}
    for part, axes in wanted.items():
        found = model.parts[part]
        assert (found.queries, found.keys) == axes
        record = model.part(part).record(**inputs)
        for module, layer in found.modules.items():
            expected = eager(dense, paths[module], inputs | {"output_attentions": True})
            if name.startswith("XLNet"):
                expected = expected.permute(2, 3, 0, 1)  # of [query, key, batch, head]
            torch.testing.assert_close(record.pattern(layer), expected, atol=1e-6, rtol=1e-5)


def test_attention_that_gives_no_weights_is_named_beside_the_one_that_does():
    config, _, _ = CASES["TimesformerModel"]
    assert hw.load(made("TimesformerModel", config)).unread == (
        "encoder.layer.*.temporal_attention.attention",
    )


def test_latents_of_a_text_need_no_picture():
    config, inputs, _ = CASES["PerceiverForMaskedLM"]
    model = hw.load(made("PerceiverForMaskedLM", config))
    assert not any(part.beside for part in model.parts.values())
    assert {part.queries for part in model.parts.values()} <= {*CONSTANT, "text"}
    assert model.part("self_attends").record(**inputs).tokens.shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("VitDetModel", {"window_block_indices": [0], "window_size": 2}, "its windows are folded into the batch"),
        ("LongformerModel", {"attention_window": 4}, "its keys are not the tokens that its queries are"),
        ("LevitModel", None, "gives no weights with output_attentions=True"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_refused_for_its_own_reason(name, config, reason):
    levit = {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
        "key_dim": [4, 4, 4], "mlp_ratio": [2, 2, 2],
    }  # fmt: skip
    base = {"VitDetModel": PICTURE, "LongformerModel": TEXT}.get(name, levit)
    with pytest.raises(ModelError, match=reason):
        hw.load(made(name, base | (config or {})))


def test_a_layer_that_attends_twice_is_read_from_the_weights_it_gives():
    config = TEXT | {"num_key_value_heads": 2}
    dense = made("DiffLlamaForCausalLM", config)
    model = hw.load(copy.deepcopy(dense))
    assert model.read_only
    with torch.no_grad():
        weights = dense(**WORDS, output_attentions=True).attentions
    record = model.record(WORDS["input_ids"])
    for layer in range(S["num_hidden_layers"]):
        torch.testing.assert_close(record.pattern(layer), weights[layer], atol=1e-6, rtol=1e-5)
