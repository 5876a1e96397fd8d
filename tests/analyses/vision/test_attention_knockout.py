"""Each cell of a knockout is one run with these keys hidden from these queries, in these layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo

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
