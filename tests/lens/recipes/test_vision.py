"""PAINT, VAR and VHR on a LLaVA of random weights, against formulas written out; `image_tokens` refuses a text."""

from __future__ import annotations

import pytest
import torch
from deep_chat import IMAGE, deep_llava

import headwater as hw
from headwater.lens.errors import EditError, HeadwaterError
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


def test_a_prompt_without_its_image_is_refused(chat):
    model, ids, _, _ = chat
    text = ids[:, IMAGE[-1] + 1 :]
    for recipe in (hw.recipes.visual_redistribution, hw.recipes.visual_emphasis):
        with pytest.raises(EditError, match="the prompt has no image tokens"):
            recipe(model, text)
    for recipe in (hw.recipes.damro, hw.recipes.head_reinforcement):
        with pytest.raises(HeadwaterError, match=r"image|picture"):
            recipe(model, text)
    with pytest.raises(EditError, match="1 to 9"):
        hw.recipes.outlier_patches(model, ids, pixel_values=chat[2], count=10)


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
