"""Short inputs of the right kind, made from a configuration; what fits none of them takes the user's sample."""

from __future__ import annotations

import pytest
import torch
import transformers

import headwater as hw
from headwater.lens.errors import ModelError
from headwater.lens.loading import zoo
from headwater.lens.samples.samples import samples

SHAPE = {"num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
SPECTROGRAM = {"max_length": 32, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
BOXES = {
    "vocab_size": 97,
    "dim_bbox_sinusoid_emb_2d": 32,
    "dim_bbox_sinusoid_emb_1d": 4,
    "dim_bbox_projection": 8,
}
TWO = {"vocab_size": 97, "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 12}


def made(name, **config):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**config)).eval()


@pytest.mark.parametrize(
    ("name", "config", "parts"),
    [
        ("VideoMAEModel", SHAPE | {"image_size": 16, "patch_size": 8, "num_frames": 4}, {"vision"}),
        ("ASTModel", SHAPE | SPECTROGRAM, {"audio"}),
        ("BrosModel", SHAPE | BOXES, {"text"}),
        ("LxmertModel", SHAPE | TWO, {"text", "vision", "cross"}),
    ],
)  # fmt: skip
def test_inputs_of_the_right_kind_are_found(name, config, parts):
    model = hw.load(made(name, **config))
    assert set(model.parts) == parts


def test_images_come_before_text_alone():
    tried = [set(sample) for sample in samples(zoo.build("clip"))]
    assert tried[0] == {"pixel_values", "input_ids", "attention_mask"}
    assert tried[-1] == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("name", "side"), [("Dinov2Model", 32), ("ViTModel", 40)])
def test_a_small_picture_is_enough_where_the_model_stretches_its_positions(name, side):
    """ViT refuses pictures of another size than its own, so it is run on that."""
    hf, seen = made(name, **SHAPE | {"image_size": 40, "patch_size": 4}), []
    # noted on the way out: what fails on a picture has not seen it
    hf.register_forward_hook(
        lambda module, args, given, out: seen.append(given["pixel_values"].shape[-1]), with_kwargs=True
    )
    model = hw.load(hf)
    assert set(seen) == {side}
    record = model.record(pixel_values=torch.randn(1, 3, 40, 40))
    assert record.strings[0] == ["[CLS]", *(f"{row},{column}" for row in range(10) for column in range(10))]


def stubborn():
    """A model that takes texts of even token ids alone."""
    model = zoo.build("llama")

    def check(module, args, kwargs):
        if (kwargs["input_ids"] % 2).any():
            raise ValueError("only even ids")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


def test_the_refusal_says_what_was_tried_and_a_sample_mends_it():
    model = stubborn()
    with pytest.raises(ModelError, match=r"input_ids \[2, 24\], .*ValueError: only even ids; .*sample="):
        hw.load(model)
    opened = hw.load(model, sample={"input_ids": torch.tensor([[4, 6, 8, 10]])})
    assert opened.n_layers == zoo.build("llama").config.num_hidden_layers


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([1], "the sample of a transformers model is"),
        ({}, "sample takes inputs by their names"),
        ({"input_ids": "word"}, "input_ids must be a tensor; got str"),
        ({"pixels": torch.ones(1)}, "reads no 'pixels'"),
    ],
)
def test_samples_that_are_no_inputs_are_refused(given, reason):
    with pytest.raises(ModelError, match=reason):
        hw.load(zoo.build("vit" if "pixels" in given else "llama"), sample=given)


def test_a_model_with_several_ends_of_a_text_opens():
    hf = zoo.build("llama")
    hf.config.eos_token_id = [2, 3]  # as GLM-4 has them
    assert hw.load(hf).moved_by_padding == hw.load(zoo.build("llama")).moved_by_padding
