"""The share of a region is a sum over a row of the map, against the map written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.analyses.vision.localised_reading import region_of
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo
from headwater.lens.naming.grids import Grid


@pytest.fixture(scope="module")
def chat():
    model = hw.load(zoo.build("llava"))
    given = zoo.inputs("llava", lengths=(11, 11))
    return model, model.to_tokens(given["input_ids"], pixel_values=given["pixel_values"])


def test_shares_are_those_of_the_last_row(chat):
    model, prompts = chat
    mask = np.zeros((24, 24), bool)
    mask[:8, 16:] = True  # the patch at the right end of the first of three rows
    found = hw.analyses.localised_reading(model, prompts, ["bottom", mask])
    maps = torch.stack([model.record(prompts).pattern(layer) for layer in (0, 1)], 1)[..., -1, 2:11].double()
    shares = [maps[0, ..., 6:].sum(-1) / maps[0].sum(-1), maps[1, ..., 2] / maps[1].sum(-1)]
    swapped = [maps[0, ..., 2] / maps[0].sum(-1), maps[1, ..., 6:].sum(-1) / maps[1].sum(-1)]
    np.testing.assert_allclose(found.share, torch.stack(shares).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.shuffled, torch.stack(swapped).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.image_mass, maps.sum(-1).mean(0), rtol=1e-5)
    hits = [maps[0].argmax(-1) >= 6, maps[1].argmax(-1) == 2]
    np.testing.assert_allclose(found.hit, torch.stack(hits).double().mean(0))
    assert float(found.chance) == pytest.approx((3 / 9 + 1 / 9) / 2)


def test_words_name_halves_of_the_grid():
    def named(words, rows, columns):
        return region_of(words, Grid(0, 1, rows, columns, columns)).view(rows, columns).nonzero().tolist()

    assert named("top left", 4, 2) == [[0, 0], [1, 0]]
    assert named("right", 2, 3) == [[0, 2], [1, 2]]  # the middle column is on neither side
    assert named("bottom right", 2, 2) == [[1, 1]]


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ("middle", "'middle'"),
        (["left"], "1 for 2 examples"),
        (np.zeros((24, 24)), "holds 0 of 9"),
        (np.ones((2, 2)), "at least 3 × 3"),
    ],
)
def test_regions_that_do_not_fit_are_refused(chat, regions, words):
    model, prompts = chat
    with pytest.raises(AnalysisError, match=words):
        hw.analyses.localised_reading(model, prompts, regions)


def test_a_text_without_a_picture_is_refused():
    with pytest.raises(AnalysisError, match="pictures inside of a text"):
        hw.analyses.localised_reading(hw.load("tasks-4l"), "Mary gave John a drink")
