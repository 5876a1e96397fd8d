"""Inputs of models that no other test names: sounds whose features stand last, boxes of words, a head on a lone tower.

Mutations seen to fail: the last axis of every sound taken for time, boxes that keep the padding of their text, classes
sought only below a model with a base of its own, a side of a pair without the axis of pictures given on as it is,
one of two texts of an encoder dropped.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.lens.errors import PromptError
from headwater.lens.loading import zoo
from headwater.lens.loading.zoo_shapes import ENCODER_DECODER, SHAPE, VISION

SPEECH = {
    "input_feat_per_channel": 8, "max_source_positions": 64, "max_target_positions": 64, "conv_channels": 16,
    "num_conv_layers": 2, "conv_kernel_sizes": [3, 3],
}  # fmt: skip


def built(kind: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    cls: Any = getattr(transformers, kind)
    return cls._from_config(cls.config_class(**config), attn_implementation="eager").eval().double()


@pytest.mark.parametrize("frames", [29, 32])
def test_a_sound_whose_features_stand_last(frames):
    plain = built("Speech2TextForConditionalGeneration", ENCODER_DECODER | SPEECH)
    model = hw.load(copy.deepcopy(plain))
    sound, words = torch.randn(2, frames, 8).double() + 1, torch.randint(3, 90, (2, 5))
    entering: list[Tensor] = []

    def difference(heard: Tensor, put: Tensor | None = None) -> Tensor:
        """The logit of 5 less that of 7 at the last word, with another stream into the encoder's first block."""

        def first(module: Any, args: tuple[Any, ...]) -> Any:
            entering.append(args[0])
            return None if put is None else (put, *args[1:])

        handle = plain.model.encoder.layers[0].register_forward_pre_hook(first)
        with torch.no_grad():
            logits = plain(input_features=heard, decoder_input_ids=words).logits[:, -1]
        handle.remove()
        return logits[:, 5] - logits[:, 7]

    whole = difference(sound)
    difference(sound.mean(1, keepdim=True).expand_as(sound))
    own, mean = entering
    places = range(own.shape[1])
    expected = [whole - difference(sound, own.index_copy(1, torch.tensor([n]), mean[:, [n]])) for n in places]
    tokens = model.to_tokens(words, input_features=sound)
    found = analyses.blank_out(model, tokens, answer="#5", wrong="#7", signed=True, blank="#3")
    found = found.values[:, found.key_part.values == "encoder"]
    assert torch.allclose(torch.tensor(found), torch.stack(expected, 1), atol=1e-9)


def test_boxes_of_words_lose_the_padding_of_their_text():
    plain = built("LayoutLMForSequenceClassification", SHAPE | {"num_labels": 3})
    model = hw.load(copy.deepcopy(plain))
    ids = torch.randint(3, 90, (2, 9))
    mask, boxes = (
        torch.ones_like(ids),
        torch.randint(0, 50, (2, 9, 2)).repeat(1, 1, 2) + torch.tensor([0, 0, 9, 9]),
    )
    mask[1, 6:] = 0
    tokens = model.to_tokens(ids, mask, bbox=boxes)
    found = analyses.input_x_gradient(model, tokens, answer=1, wrong=0)
    for row, length in enumerate((9, 6)):
        table = plain.get_input_embeddings()(ids[row : row + 1, :length]).detach().requires_grad_()
        logits = plain(inputs_embeds=table, bbox=boxes[row : row + 1, :length]).logits[0]
        (slope,) = torch.autograd.grad(logits[1] - logits[0], table)
        expected = (table * slope).sum(-1).detach()[0]
        got = torch.tensor(found.values[row, :length])
        assert torch.allclose(got.abs() / got.abs().sum(), expected.abs() / expected.abs().sum(), atol=1e-9)


def test_classes_of_a_head_on_a_lone_tower():
    plain = built("SiglipForImageClassification", {"vision_config": VISION, "num_labels": 3})
    model = hw.load(copy.deepcopy(plain))
    pixels = torch.randn(2, 3, 12, 12).double()
    with torch.no_grad():
        expected = plain(pixels).logits
        found = model(model.to_tokens(pixels))
    assert model.classes == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert torch.allclose(found, expected)
    loss = torch.nn.functional.cross_entropy(expected, torch.tensor([2, 0]), reduction="none")
    labelled = [
        hw.Example(more={"pixel_values": row[None]}, label=n) for row, n in zip(pixels, (2, 0), strict=True)
    ]
    assert torch.allclose(model.loss(labelled), loss)


def test_a_side_of_a_pair_is_a_picture_with_or_without_the_axis_of_pictures():
    model = hw.load(built("ViTForImageClassification", VISION | {"num_labels": 3}))
    clean, corrupt = torch.randn(2, 3, 12, 12).double()
    found = analyses.patch(model, [(clean, corrupt)], answer=0, wrong=1)
    batched = analyses.patch(model, [(clean[None], corrupt[None])], answer=0, wrong=1)
    assert found.identical(batched)


def test_a_text_that_is_given_twice_is_refused():
    model, ids = hw.load(zoo.build("t5")), torch.randint(3, 90, (2, 6))
    with pytest.raises(PromptError, match=r"given twice.*decoder_input_ids"):
        model.to_tokens(ids, input_ids=ids + 1)
