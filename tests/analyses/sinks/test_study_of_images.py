"""The study among image tokens: sinks masked and as many other image tokens, right answers counted, against by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deep_chat import IMAGE, deep_llava

import headwater as hw
from headwater.analyses.sinks._control_keys import control_keys
from headwater.analyses.sinks.redistribution_study import redistribution_study
from headwater.lens.loading import zoo
from headwater.lens.records import sinks


@pytest.fixture(scope="module")
def chat():
    model = hw.load(deep_llava())
    given = zoo.inputs("llava", 3, lengths=(11, 11, 11))
    return model, model.to_tokens(given["input_ids"], pixel_values=given["pixel_values"])


def test_sinks_and_controls_are_masked_among_the_image(chat) -> None:
    model, tokens = chat
    plain = model(tokens)[:, -1]
    answers = plain.argmax(-1)
    answers[0] = (answers[0] + 1) % 90  # a wrong one
    record = model.record(tokens, keep=("qk", "residual"))
    dimensions = sinks.first_dimensions(record, 1.6)
    massive = (sinks.massive_scores(record, dimensions) > 1.6)[:, :, None].expand(-1, -1, 4, -1)
    inside = torch.zeros(3, massive.shape[-1], dtype=torch.bool)
    inside[:, list(IMAGE)] = True
    masked = massive & inside[:, None, None]
    assert masked.any()
    assert (massive & ~masked).any()
    found = redistribution_study(
        model, tokens, rule="massive", threshold=1.6, among="image", keep="0", controls=1, answer=answers.tolist(),
        kind="correct", draws=20,
    )  # fmt: skip
    assert found.plain.values.tolist() == [0, 1, 1]
    np.testing.assert_allclose(found.sinks, masked.sum(-1).double().mean((1, 2)))
    drawn = control_keys(masked, inside, [0, 1, 2], 0, 0)
    assert not (drawn & ~inside[:, None, None]).any()
    changed = 0
    for treatment, keys in (("sinks", masked), ("random_keys", drawn)):
        for row in range(3):
            cuts = [
                hw.Knockout("all", keys[row, place, 0].nonzero()[:, 0].tolist(), layers=[layer])
                for place, layer in enumerate(model.layers)
            ]
            one = model.to_tokens(
                tokens.ids[row : row + 1], pixel_values=tokens.more["pixel_values"][row : row + 1]
            )
            with model.edit(*cuts):
                right = float(model(one)[0, -1].argmax() == answers[row])
            effect = right - float(found.plain[row])
            changed += effect != 0
            assert float(found.effect.sel(treatment=treatment)[0, 0, row]) == effect
    assert changed
