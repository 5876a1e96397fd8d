"""T-VHD is the sum of the largest changes of z where a word is written, by two runs written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.lens.errors import HeadwaterError
from headwater.lens.loading import zoo

IMAGE = slice(2, 11)


@pytest.fixture(scope="module")
def chat():
    model = hw.load(zoo.build("llava"))
    given = zoo.inputs("llava", lengths=(11, 11))
    return model, model.to_tokens(given["input_ids"], pixel_values=given["pixel_values"])


def by_hand(model, row, answer):
    """T-VHD without outliers, and the gain, of each word of an answer."""
    ids = torch.cat([row.ids, torch.tensor([answer])], 1)
    text = torch.cat([ids[:, : IMAGE.start], ids[:, IMAGE.stop :]], 1)
    pixels = row.more["pixel_values"]
    scores, gains = [], []
    for t, word in enumerate(answer):
        at = row.shape[1] + t - 1
        seen = model.head_outputs(ids, pixel_values=pixels)[0, :, :, at].double()
        blind = model.head_outputs(text)[0, :, :, at - 9].double()
        change, size = (seen - blind).square().sum(-1).sqrt(), blind.square().sum(-1)
        far = [x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True, correction=0) for x in (change, size)]
        scores.append(float(change.masked_fill(far[0] & far[1], 0).amax(-1).sum()))
        told = [x[0, n].double().log_softmax(-1)[word] for x, n in
                ((model(ids, pixel_values=pixels), at), (model(text), at - 9))]  # fmt: skip
        gains.append(float(told[0] - told[1]))
    return scores, gains


def test_it_is_two_runs_compared_at_each_word(chat):
    model, prompts = chat
    answers = [[5, 6, 7], [8]]
    found = hw.analyses.token_divergence(model, prompts, answers=answers)
    for row, answer in enumerate(answers):
        scores, gains = by_hand(model, prompts.rows([row]), answer)
        np.testing.assert_allclose(found.token_score[row, : len(answer)], scores, rtol=1e-4)
        np.testing.assert_allclose(found.gain[row, : len(answer)], gains, atol=1e-4)
    assert found.token_score[1, 1:].isnull().all()
    assert found.token_text.dims == ("batch", "token")


def test_without_answers_the_words_are_the_models_own(chat):
    model, prompts = chat
    own = [model.generate(prompts.rows([row]), max_new_tokens=3)[0, -3:].tolist() for row in (0, 1)]
    found = hw.analyses.token_divergence(model, prompts, length=3, strongest=2, outliers=True)
    given = hw.analyses.token_divergence(model, prompts, own, strongest=2, outliers=True)
    assert found.token_score.equals(given.token_score)
    two = np.sort(found.score.values, 2)[:, :, -2:].sum((1, 2))
    np.testing.assert_allclose(found.token_score, two)


def test_what_has_no_picture_is_refused(chat):
    model, prompts = chat
    for subject, given in ((model, prompts.ids[:, IMAGE.stop :]), (hw.load("tasks-4l"), "Mary gave")):
        with pytest.raises(HeadwaterError, match=r"no picture|pictures inside of a text"):
            hw.analyses.token_divergence(
                subject, given, answers=[[5]] * len(given) if given is not None else None
            )
