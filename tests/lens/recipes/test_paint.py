"""The sensitivity of heads to the image, written out by hand, and the emphasis that goes by it."""

from __future__ import annotations

import pytest
import torch
from deep_chat import IMAGE, deep_llava

import headwater as hw
from headwater.lens.errors import EditError
from headwater.lens.loading import zoo


@pytest.fixture(scope="module")
def chat():
    model = hw.load(deep_llava())
    given = zoo.inputs("llava", lengths=(11, 8))
    return model, given, model.record(**given)


def test_mass_is_the_last_row_on_the_image(chat):
    model, given, plain = chat
    found = hw.recipes.visual_sensitivity(
        model, **{"prompts": given["input_ids"], **_more(given)}, measure="mass"
    )
    for row, last in enumerate((19, 16)):
        for place, layer in enumerate(model.layers):
            weights = plain.pattern(layer)[row, :, last, list(IMAGE)].double()
            torch.testing.assert_close(found[row, place], weights.sum(-1))


def test_change_is_that_of_a_run_whose_text_does_not_see_the_image(chat):
    model, given, _ = chat
    found = hw.recipes.visual_sensitivity(model, given["input_ids"], **_more(given))
    seen = model.head_outputs(**given).double()
    with model.edit(hw.Knockout(queries=slice(IMAGE[-1] + 1, None), keys=list(IMAGE))):
        blind = model.head_outputs(**given).double()
    for row, last in enumerate((19, 16)):
        change = (seen - blind)[row, :, :, last].norm(dim=-1) / seen[row, :, :, last].norm(dim=-1)
        torch.testing.assert_close(found[row], change)
    assert found.min() > 0.01


def test_the_most_sensitive_heads_of_each_layer_are_taken(chat):
    model, given, _ = chat
    mean = hw.recipes.visual_sensitivity(model, given["input_ids"], **_more(given)).mean(0)
    heads = hw.recipes.sensitive_heads(model, given["input_ids"], share=0.5, layers=[1, 3], **_more(given))
    assert [head.layer for head in heads] == [1, 1, 3, 3]
    for layer in (1, 3):
        taken = {head.head for head in heads if head.layer == layer}
        assert min(mean[layer, list(taken)]) > max(mean[layer, n] for n in range(4) if n not in taken)
    one = {"input_ids": given["input_ids"][:1], "pixel_values": given["pixel_values"][:1]}
    edits = hw.recipes.visual_emphasis(
        model, one["input_ids"], pixel_values=one["pixel_values"], heads="sensitive"
    )
    alone = hw.recipes.sensitive_heads(model, one["input_ids"], pixel_values=one["pixel_values"])
    assert all(edit.heads == alone for edit in edits)


def test_received_attention_ranks_patches_where_there_is_no_class_token():
    hf = deep_llava()
    model = hw.load(hf)
    given = zoo.inputs("llava", lengths=(11,))
    local, _ = hw.recipes.visual_emphasis(
        model, given["input_ids"], pixel_values=given["pixel_values"], rank="received"
    )
    vision = model.record(**given).part("vision")
    received = vision.pattern(0)[0, :, 1:, 1:].sum((0, 1))
    assert sorted(local.keys) == sorted(IMAGE[n] for n in received.argsort(descending=True)[:2].tolist())
    with pytest.raises(EditError, match="rank is one of class, received"):
        hw.recipes.visual_emphasis(model, given["input_ids"], pixel_values=given["pixel_values"], rank="mine")


def _more(given):
    return {"attention_mask": given["attention_mask"], "pixel_values": given["pixel_values"]}
