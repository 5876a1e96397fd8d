"""PAINT and VAR on a LLaVA of random weights, against formulas written out; `image_tokens.py` refuses a text."""

from __future__ import annotations

import pytest
import torch
from deep_chat import IMAGE, deep_llava

import headwater as hw
from headwater.lens.errors import EditError
from headwater.lens.loading import zoo


@pytest.fixture(scope="module")
def chat():
    """A LLaVA whose text has four layers, its prompt and image, and the record of its unedited run."""
    model = hw.load(deep_llava())
    given = zoo.inputs("llava", lengths=(11,))
    ids, pixels = given["input_ids"], given["pixel_values"]
    return model, ids, pixels, model.record(ids, pixel_values=pixels)


def test_visual_emphasis_raises_the_scores_of_local_patches_for_the_last_token(chat):
    model, ids, pixels, plain = chat
    local, summary = hw.recipes.visual_emphasis(model, ids, pixel_values=pixels, alpha=0.7)
    seen = plain.part("vision").pattern(0)[0, :, 0, 1:].sum(0)
    assert sorted(local.keys) == sorted(IMAGE[n] for n in seen.argsort(descending=True)[:2].tolist())
    with model.edit(local, summary):
        found = model.record(ids, pixel_values=pixels).pattern(0)[0]
    q, k = (x[0].double() for x in (plain.map(0).q, plain.map(0).k))
    scores = (q[:, -1:] @ k.repeat_interleave(2, 0).mT)[:, 0] * plain.map(0).rule.scale
    for edit in (local, summary):
        scores[:, edit.keys] += edit.amount * scores[:, edit.keys].abs()
    torch.testing.assert_close(found[:, -1].double(), scores.softmax(-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[:, :-1], plain.pattern(0)[0, :, :-1], atol=1e-6, rtol=1e-5)


def test_visual_redistribution_feeds_the_image_from_its_sinks(chat):
    model, ids, pixels, plain = chat
    states = model.hf(input_ids=ids, pixel_values=pixels, output_hidden_states=True).hidden_states
    largest = int(states[2].abs().mean((0, 1)).argmax())
    (edit,) = hw.recipes.visual_redistribution(
        model, ids, pixel_values=pixels, tau=1.6, dimensions=[largest], rho=1.0, least=0.0
    )
    sizes = states[2][0].double()
    massive = (
        (sizes[:, largest].abs() / (sizes.square().mean(-1) + 1e-6).sqrt() > 1.6).nonzero()[:, 0].tolist()
    )
    fed = [n for n in IMAGE if n not in massive]
    assert edit.layers == 2
    assert set(massive) & set(IMAGE)
    assert fed
    with model.edit(edit):
        found = model.record(ids, pixel_values=pixels).pattern(2)[0].double()
    expected = plain.pattern(2)[0].double()
    for row in range(IMAGE[-1] + 1, ids.shape[1]):
        freed = 0.4 * expected[:, row, massive].sum(-1, keepdim=True)
        share = expected[:, row, fed] / expected[:, row, fed].sum(-1, keepdim=True)
        expected[:, row, massive] *= 0.6
        expected[:, row, fed] += freed * share
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_prompt_without_its_image_is_refused(chat):
    model, ids, _, _ = chat
    text = ids[:, IMAGE[-1] + 1 :]
    for recipe in (hw.recipes.visual_redistribution, hw.recipes.visual_emphasis):
        with pytest.raises(EditError, match="the prompt has no image tokens"):
            recipe(model, text)


@torch.no_grad()
def test_sinks_of_the_edited_run_need_no_prompt_of_their_own(chat):
    model, ids, pixels, _ = chat
    given = {"dimensions": [3, 4], "tau": 1.6, "rho": 1.0, "least": 0.0, "p": 0.0}
    (edit,) = hw.recipes.visual_redistribution(
        model, ids, pixel_values=pixels, sinks_of="edited run", **given
    )
    assert edit == hw.RedistributeMassive([3, 4], 0.0, 1.6, 1.0, 0.0, layers=[2])
    plain = hw.recipes.visual_redistribution(model, ids, pixel_values=pixels, **given)
    with model.edit(edit):
        found = model(ids, pixel_values=pixels)
    with model.edit(*plain):  # one layer is edited, so the sinks are the same
        torch.testing.assert_close(found, model(ids, pixel_values=pixels))
