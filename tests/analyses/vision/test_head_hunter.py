"""HeadHunter against a search by hand, for pictures and for the logits of texts.

Seen to fail with the worst heads taken, with examples of the search judging, and with a journal that is not read.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.lens.errors import AnalysisError

TEXT = "When Mary and John went to the store , John gave a drink to"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("diffusers")
    import tiny_diffusers

    return hw.load(tiny_diffusers.pixel_pipeline(tmp_path_factory.mktemp("pixels") / "tiny"))


class Brightness:
    """The mean grey of the upper half; counts the pictures that it was shown."""

    def __init__(self):
        self.seen = 0

    def __call__(self, pictures, prompts):
        self.seen += len(pictures)
        return [float(np.asarray(picture, float)[:2].mean()) for picture in pictures]


def by_hand(model, heads, seeds, weight=2.0):
    edits = [hw.AtSteps(hw.TowardIdentity(1.0, heads=list(heads)), branch="perturbed")]
    with model.part("self").edit(*edits):
        return [
            np.asarray(model.pipeline("a dog", seed=seed, perturbed_guidance_scale=weight), float)[:2].mean()
            for seed in seeds
        ]


NAMES = [f"{layer}.{head}" for layer, head in itertools.product(range(2), range(2))]


def test_a_greedy_search_adds_the_best_head_of_each_round(model):
    found = hw.analyses.head_hunter(
        model, "a dog", Brightness(), count=1, rounds=2, weight=2.0, pictures=2, controls=2, draws=10, seed=4
    )
    chosen = []
    for at in range(2):
        others = [name for name in NAMES if name not in chosen]
        means = {name: np.mean(by_hand(model, [*chosen, name], (4, 5))) for name in others}
        for name in NAMES:
            layer, head = map(int, name.split("."))
            np.testing.assert_allclose(found.search[at, layer, head], means.get(name, np.nan))
        chosen.append(max(means, key=means.get))
    assert found.chosen.values.tolist() == chosen
    np.testing.assert_allclose(found.found, np.mean(by_hand(model, chosen, (4, 5))))
    judged = by_hand(model, chosen, (6, 7))  # other seeds than those of the search
    np.testing.assert_allclose(found.per_example.sel(treatment="chosen"), judged)
    np.testing.assert_allclose(found.per_example.sel(treatment="every"), by_hand(model, NAMES, (6, 7)))
    gain = found.measure.sel(treatment="chosen") - found.measure.sel(treatment="plain")
    np.testing.assert_allclose(found.gain.sel(against="plain"), gain)


def test_a_beam_that_holds_every_set_finds_the_best_pair(model):
    found = hw.analyses.head_hunter(
        model, "a dog", Brightness(), count=1, rounds=2, beam=3, weight=2.0, controls=1, draws=10, seed=4
    )
    pairs = {pair: by_hand(model, pair, (4,))[0] for pair in itertools.combinations(NAMES, 2)}
    greedy = hw.analyses.head_hunter(
        model, "a dog", Brightness(), count=1, rounds=2, weight=2.0, controls=1, draws=10, seed=4
    )
    assert float(found.found) == pytest.approx(max(pairs.values()))
    assert float(found.found) >= float(greedy.found)


def test_a_search_goes_on_where_it_was_stopped(model, tmp_path):
    options = {"count": 2, "weight": 2.0, "controls": 1, "draws": 10, "resume": tmp_path / "run"}
    measure = Brightness()
    first = hw.analyses.head_hunter(model, "a dog", measure, **options)
    lines = (tmp_path / "run").read_text().splitlines(keepends=True)
    (tmp_path / "run").write_text("".join(lines[:4]))
    shown, measure.seen = measure.seen, 0
    again = hw.analyses.head_hunter(model, "a dog", measure, **options)
    assert measure.seen == shown - 3
    assert again.identical(first)
    with pytest.raises(AnalysisError, match="of another run"):
        hw.analyses.head_hunter(model, "a dog", measure, **(options | {"weight": 1.0}))


def test_long_texts_that_end_otherwise_are_another_run(tmp_path):
    options = {
        "answer": "Mary",
        "heads": ["2.0"],
        "count": 1,
        "controls": 1,
        "draws": 5,
        "resume": tmp_path / "run",
    }
    model, long = hw.load("tasks-4l"), f"{TEXT} Mary . " * 4
    hw.analyses.head_hunter(model, long + TEXT, **options)
    with pytest.raises(AnalysisError, match="of another run"):
        hw.analyses.head_hunter(model, long + "John gave a drink to", **options)


def test_texts_are_guided_by_their_logits():
    model = hw.load("tasks-4l")
    heads = ["2.0", "3.1", "3.4"]
    found = hw.analyses.head_hunter(
        model, [TEXT, "The capital of France is called"], answer=["Mary", "Paris"], count=1, heads=heads, weight=1.5,
        controls=1, draws=10,
    )  # fmt: skip
    ids = [model.tokenizer.convert_tokens_to_ids(word) for word in ("Mary", "Paris")]
    for head in heads:
        values = []
        for text, answer in zip((TEXT, "The capital of France is called"), ids, strict=True):
            plain = model(text)[0, -1].double()
            with model.edit(hw.TowardIdentity(1.0, heads=head)):
                perturbed = model(text)[0, -1].double()
            values.append(float((2.5 * plain - 1.5 * perturbed).log_softmax(-1)[answer]))
        layer, index = map(int, head.split("."))
        assert float(found.search[0, layer, index]) == pytest.approx(np.mean(values), abs=1e-4)
    assert found.attrs["judged"] == "search examples"


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(AnalysisError, match="needs measure="):
        hw.analyses.head_hunter(model, "a dog")
    with pytest.raises(AnalysisError, match="need 5 heads; there are 4"):
        hw.analyses.head_hunter(model, "a dog", Brightness(), count=5)


def test_the_search_restores_the_random_state(model):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    hw.analyses.head_hunter(model, "a dog", Brightness(), count=1, heads=["0.0", "0.1"], controls=1, draws=10)
    assert torch.equal(torch.random.get_rng_state(), before)
