"""FlowCut's and VFlowOpt's recipes: what is left; edits/test_prune_tokens.py holds the scores to their formulas."""

from __future__ import annotations

import pytest
import torch

import headwater as hw
from headwater.lens.errors import EditError
from headwater.lens.loading import zoo


@pytest.fixture(scope="module")
def llava():
    return hw.load(zoo.build("llava")), zoo.inputs("llava")


def test_flowcut_leaves_as_many_patches_as_it_is_asked_for(llava):
    model, given = llava
    tower = model.part("vision")
    with tower.edit(*hw.recipes.flowcut(tower, 4)):
        logits = model(**given)
    images = given["input_ids"] == model.image_token
    left = ~logits.isnan().any(-1)
    assert (left & images).sum(-1).tolist() == [4, 4]
    assert left[~images].all()


def test_vflowopt_keeps_the_patches_of_attention_and_entropy(llava):
    model, given = llava
    pixels = given["pixel_values"].clone()
    pixels[:, :, :4] = 0.0  # three patches of one grey: their entropy is 0
    given = {**given, "pixel_values": pixels}
    with model.edit(*hw.recipes.vflowopt(model, {0: 6}, pixels, mix=1.0, recycle=0)):
        logits = model(**given)
    images = given["input_ids"] == model.image_token
    for row in range(2):
        left = ~logits[row, images[row]].isnan().any(-1)
        assert left.tolist() == [False] * 3 + [True] * 6
    with model.edit(*hw.recipes.vflowopt(model, {0: 6})):
        logits = model(**given)
    assert (~logits.isnan().any(-1) & images).sum(-1).tolist() == [7, 7]  # and one recycled token


def test_pixels_that_are_no_pictures_are_refused(llava):
    model, _ = llava
    with pytest.raises(EditError, match="pixels are"):
        hw.recipes.vflowopt(model, {0: 6}, torch.zeros(3))
