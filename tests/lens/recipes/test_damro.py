"""DAMRO's branch sees the outlier patches alone."""

from __future__ import annotations

import pytest
import torch
from deep_chat import IMAGE, deep_llava

import headwater as hw
from headwater.lens.errors import EditError
from headwater.lens.loading import zoo


@pytest.fixture(scope="module")
def chat():
    """A LLaVA of random weights, its prompt and image, and the record of its unedited run."""
    model = hw.load(deep_llava())
    given = zoo.inputs("llava", lengths=(11,))
    ids, pixels = given["input_ids"], given["pixel_values"]
    return model, ids, pixels, model.record(ids, pixel_values=pixels)


def test_damro_keeps_the_patches_that_the_class_token_attends_to_most(chat):
    model, ids, pixels, plain = chat
    tower = plain.part("vision")
    map = tower.map(tower.layers[-2])
    q, k = (x[0].transpose(0, 1).flatten(1).double() for x in (map.q, map.k))  # full width
    weights = (q[0] @ k[1:].T / q.shape[1] ** 0.5).softmax(-1)
    top = weights.argsort(descending=True)[:3].tolist()
    assert hw.recipes.outlier_patches(model, ids, pixel_values=pixels, count=3).tolist() == [top]
    branch = hw.recipes.damro(model, ids, pixel_values=pixels, count=3, alpha=0.7)
    assert (branch.weight, branch.plausible) == (0.7, 0.1)
    assert sorted(branch.edits[0].keys) == sorted(IMAGE[n] for n in range(9) if n not in top)


def test_damro_is_a_run_without_the_other_features_at_the_same_positions(chat):
    model, ids, pixels, _ = chat
    kept = [1, 5, 6]
    branch = hw.recipes.damro(model, ids, pixel_values=pixels, patches=[kept])
    with model.edit(*branch.edits):
        found = model(ids, pixel_values=pixels)[0, -1]
    hf = model.hf
    places = [n for n in range(ids.shape[1]) if n not in IMAGE or n - IMAGE[0] in kept]
    with torch.no_grad():
        vectors = hf.get_input_embeddings()(ids)
        vectors[0, IMAGE[0] : IMAGE[-1] + 1] = hf.get_image_features(pixels).pooler_output[0]
        # without a mask transformers takes a gap in the positions for the beginning of another text
        inside = {"inputs_embeds": vectors[:, places], "attention_mask": torch.ones(1, len(places))}
        same, anew = (
            hf.lm_head(hf.model.language_model(**inside, position_ids=torch.tensor([n])).last_hidden_state)[
                0, -1
            ]
            for n in (places, list(range(len(places))))
        )
    torch.testing.assert_close(found, same, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, anew, atol=1e-3)  # the authors number what is left anew


def test_what_has_no_outlier_patches_is_refused(chat):
    model, ids, pixels, _ = chat
    with pytest.raises(EditError, match="has no picture"):
        hw.recipes.damro(model, ids[:, IMAGE[-1] + 1 :])
    with pytest.raises(EditError, match="no tower of images with a class token"):
        hw.recipes.damro(hw.load("tasks-4l"), "Mary gave")
    with pytest.raises(EditError, match="1 to 9"):
        hw.recipes.outlier_patches(model, ids, pixel_values=pixels, count=10)
    with pytest.raises(EditError, match="patch 9 of picture 0"):
        hw.recipes.damro(model, ids, pixel_values=pixels, patches=[[1, 9]])
