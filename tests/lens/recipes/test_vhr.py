"""VHR scales the heads that see the picture, by two runs written out."""

from __future__ import annotations

import pytest
import torch
from deep_chat import IMAGE, deep_llava

import headwater as hw
from headwater.lens.errors import PromptError
from headwater.lens.loading import zoo


@pytest.fixture(scope="module")
def chat():
    """A LLaVA of random weights, its prompt and image, and the record of its unedited run."""
    model = hw.load(deep_llava())
    given = zoo.inputs("llava", lengths=(11,))
    ids, pixels = given["input_ids"], given["pixel_values"]
    return model, ids, pixels, model.record(ids, pixel_values=pixels)


def test_head_reinforcement_compares_with_the_text_alone(chat):
    model, ids, pixels, _ = chat
    text = torch.cat([ids[:, : IMAGE[0]], ids[:, IMAGE[-1] + 1 :]], 1)
    (edit,) = hw.recipes.head_reinforcement(model, ids, text, pixel_values=pixels, layers="all")
    blind = model.head_outputs(text)[0, :, :, -1]
    difference = (model.head_outputs(ids, pixel_values=pixels)[0, :, :, -1] - blind).norm(dim=-1)
    size = blind.square().sum(-1)
    out = [x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, unbiased=False) for x in (difference, size)]
    difference = difference.masked_fill(out[0] & out[1], 0)
    chosen = (difference > difference.quantile(0.5, dim=-1, keepdim=True)).nonzero().tolist()
    assert edit.factors == {f"{layer}.{head}": 2.0 for layer, head in chosen}


def test_head_reinforcement_leaves_the_image_out_and_goes_layer_by_layer(chat):
    model, ids, pixels, _ = chat
    text = torch.cat([ids[:, : IMAGE[0]], ids[:, IMAGE[-1] + 1 :]], 1)
    once = hw.recipes.head_reinforcement(model, ids, text, pixel_values=pixels, layers="all")
    assert once == hw.recipes.head_reinforcement(model, ids, pixel_values=pixels, layers="all")
    (edit,) = hw.recipes.head_reinforcement(
        model, ids, pixel_values=pixels, layers="all", alpha=9.0, in_turn=True
    )
    factors = {}
    for layer in range(4):
        with model.edit(hw.ScaleHeads(dict(factors))):
            seen = model.head_outputs(ids, pixel_values=pixels)[0, layer, :, -1]
            blind = model.head_outputs(text)[0, layer, :, -1]
        found, size = (seen - blind).norm(dim=-1), blind.square().sum(-1)
        far = (found > found.mean() + found.std(correction=0)) & (size > size.mean() + size.std(correction=0))
        found = found.masked_fill(far, 0)
        factors |= {f"{layer}.{head}": 9.0 for head in (found > found.quantile(0.5)).nonzero()[:, 0].tolist()}
    assert set(edit.factors) == set(factors)
    assert edit != hw.recipes.head_reinforcement(model, ids, pixel_values=pixels, layers="all", alpha=9.0)[0]


def test_a_prompt_without_a_picture_is_refused(chat):
    model, ids, _, _ = chat
    with pytest.raises(PromptError, match="0 with image tokens"):
        hw.recipes.head_reinforcement(model, ids[:, IMAGE[-1] + 1 :])
