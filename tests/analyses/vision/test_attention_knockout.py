"""Each cell of a knockout is one run with these keys hidden from these queries, in these layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo
from headwater.lens.running.written import written_behind

PLACES = {"image": [*range(2, 11)], "before": [0, 1], "question": [*range(11, 19)], "answer": [19, 20]}


@pytest.fixture(scope="module")
def chat():
    model = hw.load(zoo.build("llava"))
    given = zoo.inputs("llava", lengths=(11, 11))
    return model, model.to_tokens(given["input_ids"], pixel_values=given["pixel_values"])


def probability(model, prompts, words, source=None, target=None, layers=()):
    """Of both words behind each prompt, while the target does not see the source in these layers."""
    ids = torch.cat([prompts.ids, torch.tensor(words)], 1)
    edits = (
        [hw.Knockout([q], PLACES[source], layers=layer) for q in PLACES[target] for layer in layers]
        if layers
        else []
    )
    with model.edit(*edits):
        told = model(ids, **prompts.more).double().softmax(-1)
    return [float(told[row, 19, first] * told[row, 20, second]) for row, (first, second) in enumerate(words)]


@pytest.mark.parametrize("blocked", ["window", "others"])
def test_a_cell_is_one_run_with_the_route_blocked(chat, blocked):
    model, prompts = chat
    words = [[5, 9], [7, 8]]
    routes = "image->question, question->answer, before->answer"
    found = hw.analyses.attention_knockout(
        model, prompts, words, routes=routes, window=1, blocked=blocked, controls=0, batch_size=1
    )
    assert found.route.values.tolist() == ["image->question", "question->answer", "before->answer"]
    assert found.window.values.tolist() == ["0", "1", "all"]
    np.testing.assert_allclose(
        found.plain_probability, np.mean(probability(model, prompts, words)), rtol=1e-4
    )
    for route in found.route.values:
        for window, layers in (("0", [0]), ("1", [1]), ("all", [0, 1])):
            layers = layers if blocked == "window" else [n for n in (0, 1) if n not in layers]
            expected = np.mean(probability(model, prompts, words, *route.split("->"), layers))
            np.testing.assert_allclose(found.probability.sel(route=route, window=window), expected, rtol=1e-4)
    assert float(np.ptp(found.probability.values)) > 1e-6


def test_the_models_own_answers_stay_where_nothing_is_blocked(chat):
    model, prompts = chat
    found = hw.analyses.attention_knockout(
        model, prompts, routes="image->answer", controls=2, length=2, seed=1
    )
    assert float(found.plain_accuracy) == 1
    assert found.window.values.tolist() == ["0", "1", "all"]  # a quarter of two layers is one
    assert found.attrs["window"] == 1
    assert "random_probability_low" in found
    np.testing.assert_allclose(found.gap, found.random_probability - found.probability, atol=1e-12)
    again = hw.analyses.attention_knockout(
        model, prompts, routes="image->answer", controls=2, length=2, seed=1
    )
    assert again.equals(found)


@pytest.mark.parametrize("name", ["paligemma", "blip2", "qwen2_5_vl", "idefics2"])
def test_an_answer_behind_the_prompt_is_as_likely_as_when_the_model_writes_it(name):
    hf = zoo.build(name)
    model = hw.load(hf)
    if name == "paligemma":  # it reads what is of type 0 in both directions
        given = zoo.inputs(name, lengths=(11,)) | {"token_type_ids": torch.zeros(1, 20, dtype=torch.long)}
    else:
        given = {name: value for name, value in model.sample.items() if not name.startswith("decoder")}
    ids, mask = given.pop("input_ids"), given.pop("attention_mask", None)
    row = model.to_tokens(ids, mask, **given).rows([0])
    prompt = written_behind(hf, row, [5, 6, 7])
    if name == "paligemma":
        prompt.more["token_type_ids"].zero_()
    found = hw.analyses.attention_knockout(
        model, prompt, routes="image->answer", window=1, controls=0, length=2
    )
    told = hf.generate(
        input_ids=prompt.ids, attention_mask=prompt.mask.long(), max_new_tokens=2, do_sample=False, **prompt.more,
        output_scores=True, return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    expected = np.prod([float(step[0].double().softmax(-1).max()) for step in told.scores])
    np.testing.assert_allclose(found.plain_probability, expected, rtol=1e-4)


def test_a_prompt_read_in_both_directions_with_its_route_masked_by_hand():
    """PaliGemma in eager attention: a mask with the route closed, and the answer's words of type 1."""
    hf = zoo.build("paligemma")
    given = zoo.inputs("paligemma", lengths=(11, 11))
    pixels, types = given["pixel_values"], torch.zeros(2, 20, dtype=torch.long)
    words = torch.tensor([[5, 9], [7, 8]])

    def close(module, args, kwargs):
        mask = kwargs["attention_mask"].expand(2, -1, -1, -1).clone()
        mask[:, :, np.ix_(PLACES["question"], PLACES["image"])[0], PLACES["image"]] = -torch.inf
        return args, kwargs | {"attention_mask": mask}

    handle = hf.model.language_model.layers[0].self_attn.register_forward_pre_hook(close, with_kwargs=True)
    with torch.no_grad():
        told = hf(
            input_ids=torch.cat([given["input_ids"], words], 1), pixel_values=pixels,
            token_type_ids=torch.cat([types, torch.ones_like(words)], 1),
        ).logits.double().softmax(-1)  # fmt: skip
    handle.remove()
    expected = np.mean([float(told[n, 19, a] * told[n, 20, b]) for n, (a, b) in enumerate(words.tolist())])
    model = hw.load(hf)
    prompts = model.to_tokens(given["input_ids"], pixel_values=pixels, token_type_ids=types)
    found = hw.analyses.attention_knockout(
        model, prompts, words.tolist(), routes="image->question", window=1, controls=0
    )
    np.testing.assert_allclose(found.probability.sel(window="0").item(), expected, rtol=1e-4)
    assert abs(found.plain_probability.item() / expected - 1) > 1e-3


def test_pictures_that_are_no_tokens_of_the_text_are_refused():
    model = hw.load(zoo.build("mllama"))
    given = dict(model.sample)
    prompts = model.to_tokens(given.pop("input_ids"), given.pop("attention_mask", None), **given)
    with pytest.raises(AnalysisError, match="look at its pictures in the part 'cross'"):
        hw.analyses.attention_knockout(model, prompts)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"routes": "image to answer"}, "is no route"),
        ({"routes": "image->sky"}, "is no route"),
        ({"window": 3}, "has 2 layers"),
        ({"answers": [[5]]}, "1 for 2 examples"),
        ({"answers": [[5], [100000]]}, "words of the vocabulary"),
    ],
)
def test_settings_that_do_not_fit_are_refused(chat, settings, words):
    model, prompts = chat
    with pytest.raises(AnalysisError, match=words):
        hw.analyses.attention_knockout(model, prompts, **settings)


def test_random_keys_are_those_of_an_example_whatever_its_batch() -> None:
    model = hw.load(zoo.build("llava"))
    given = zoo.inputs("llava", lengths=(11, 11, 11))
    prompts = model.to_tokens(given["input_ids"], pixel_values=given["pixel_values"])
    settings = {"routes": "image->answer", "window": 1, "controls": 2, "draws": 10}
    one, three = (
        hw.analyses.attention_knockout(model, prompts, batch_size=size, **settings) for size in (1, 3)
    )
    found, same = (each.random_probability.values for each in (one, three))
    np.testing.assert_allclose(found, same, atol=1e-6)
