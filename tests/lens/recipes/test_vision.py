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


def test_the_stream_of_a_hybrid_model_is_that_of_its_own_layer():
    model, ids = hw.load(zoo.build("qwen3_next")), zoo.inputs("qwen3_next")["input_ids"][:1]
    (layer,) = model.layers  # the first layer has no attention
    assert layer == 1
    states = model.hf(input_ids=ids[:, :1], output_hidden_states=True).hidden_states
    state = states[layer][0, 0].detach()
    sizes = state.abs() / (state.square().mean() + 1e-6).sqrt()
    tau = float(sizes.topk(3).values[1:].mean())
    assert hw.recipes.massive_dimensions(model, ids, tau=tau) == sorted(sizes.topk(2).indices.tolist())


def test_what_has_no_text_behind_its_image_or_no_such_dimension_is_refused(chat):
    model, ids, pixels, _ = chat
    cut = ids[:, : IMAGE[-1] + 1]
    for recipe in (hw.recipes.visual_redistribution, hw.recipes.visual_sensitivity):
        more = {"dimensions": [0]} if recipe is hw.recipes.visual_redistribution else {}
        with pytest.raises(EditError, match="no token stands behind the image of prompt 0"):
            recipe(model, cut, pixel_values=pixels, **more)
        with pytest.raises(EditError, match="reads no text behind its picture here"):
            recipe(model.part("vision"), ids, pixel_values=pixels, **more)
    for dimensions in ([9999], [-1], [], 3):
        for sinks_of in ("plain run", "edited run"):
            with pytest.raises(EditError, match="dimensions are numbers from 0 to"):
                hw.recipes.visual_redistribution(
                    model, ids, pixel_values=pixels, dimensions=dimensions, sinks_of=sinks_of
                )
    with pytest.raises(EditError, match="tau is a number"):
        hw.recipes.visual_redistribution(model, ids, pixel_values=pixels, dimensions=[0], tau="a")
    shallow = hw.load(zoo.build("llava"))
    with pytest.raises(EditError, match="take a model of four layers or more"):
        hw.recipes.visual_redistribution(shallow, ids, pixel_values=pixels, dimensions=[0])


def test_a_batch_in_which_a_prompt_has_no_image_and_a_share_out_of_bounds_are_refused(chat):
    model, ids, pixels, _ = chat
    mixed = torch.cat([ids, torch.full_like(ids, 20)])
    for measure in ("mass", "change"):
        with pytest.raises(EditError, match="prompt 1 has no image"):
            hw.recipes.visual_sensitivity(model, mixed, pixel_values=pixels, measure=measure)
    for share in (2, -1, float("nan"), "a"):
        with pytest.raises(EditError, match="share is"):
            hw.recipes.visual_emphasis(model, ids, pixel_values=pixels, share=share)
        with pytest.raises(EditError, match="share is"):
            hw.recipes.sensitive_heads(model, ids, pixel_values=pixels, share=share)
