"""Hidden image tokens change the next answer as in a run whose words do not see them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo

FURTHER = [4, 5, 6]


@pytest.fixture(scope="module")
def chat():
    model = hw.load(zoo.build("llava"))
    given = zoo.inputs("llava", lengths=(11, 11, 11, 11))
    return model, model.to_tokens(given["input_ids"], pixel_values=given["pixel_values"])


def test_a_point_is_a_run_that_sees_the_most_attended_tokens(chat):
    model, prompts = chat
    found = hw.analyses.image_compression(model, prompts, FURTHER, keep="0,4", length=2, controls=1)
    kept, alone = [], []
    for row in range(len(prompts)):
        one = prompts.rows([row])
        pixels = one.more["pixel_values"]
        said = model.generate(one, max_new_tokens=2)
        maps = model.record(said, pixel_values=pixels)
        looked = sum(maps.pattern(layer)[0, :, 19:21, 2:11].double().sum((0, 1)) for layer in (0, 1))
        hidden = [2 + n for n in range(9) if n not in looked.topk(4).indices.tolist()]
        ids = torch.cat([said, torch.tensor([FURTHER])], 1)
        plain = model(ids, pixel_values=pixels)[0, -1].argmax()
        for keys, into in ((hidden, kept), ([*hidden, *range(11, 22)], alone)):
            with model.edit(hw.Knockout([22, 23, 24], keys)):
                into.append(bool(model(ids, pixel_values=pixels)[0, -1].argmax() == plain))
    assert float(found.accuracy.sel(kind="kept", kept=4)) == np.mean(kept)
    assert float(found.accuracy.sel(kind="alone", kept=4)) == np.mean(alone)
    assert float(found.plain_accuracy) == 1
    assert (found.accuracy <= 1).all()


def test_all_tokens_are_the_whole_picture_and_the_first_question_is_asked_again(chat):
    model, prompts = chat
    found = hw.analyses.image_compression(model, prompts.rows([0, 1]), keep="9", controls=2)
    assert found.accuracy.sel(kept=9, kind=["kept", "random"]).values.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": "4, ten"}, "numbers of tokens"),
        ({"keep": "10"}, "9 image tokens"),
        ({"answers": [[5]]}, "1 for 4"),
    ],
)
def test_settings_that_do_not_fit_are_refused(chat, settings, words):
    model, prompts = chat
    with pytest.raises(AnalysisError, match=words):
        hw.analyses.image_compression(model, prompts, FURTHER, **settings)
