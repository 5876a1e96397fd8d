"""The offsets of LoFiT as edits, their first step in closed form, and their controls.

Mutations seen to fail: offsets of heads that were not chosen trained too, the mean over batches
not weighed by their size.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.analyses.heads.fit_offsets import offset_controls, offsets_edit
from headwater.lens.errors import AnalysisError, HeadError

IDS = torch.tensor([[3, 9, 4], [5, 7, 8], [6, 6, 2]])


def likes_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return -logits[:, -1].log_softmax(-1)[:, 11]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_offsets_are_an_edit_that_gives_the_same_loss(pairs, name: str) -> None:
    model = pairs(name).model
    before = [parameter.clone() for parameter in model.hf.parameters()]
    found = analyses.fit_offsets(model, IDS, heads="2.1 0.3", loss=likes_token, steps=6, rate=0.1)
    assert float(found.loss_after) < float(found.loss_before)
    edit = offsets_edit(found)
    assert set(edit.offsets) == {"0.3", "2.1"}
    again = hw.edit_from_dict(json.loads(json.dumps(edit.to_dict())))
    assert float(likes_token(model(IDS), IDS).mean()) == pytest.approx(float(found.loss_before), rel=1e-5)
    with model.edit(again):
        assert float(likes_token(model(IDS), IDS).mean()) == pytest.approx(float(found.loss_after), rel=1e-4)
    assert (found.offset.values[~found.trained.values] == 0).all()
    for parameter, old in zip(model.hf.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)


def test_the_first_step_in_closed_form(pairs) -> None:
    """A step of Adam moves every coordinate of the chosen head by the rate, and no other."""
    model = pairs("llama").model
    start = analyses.fit_offsets(model, IDS, heads=["1.2"], loss=likes_token, steps=1, rate=0.0)
    found = analyses.fit_offsets(model, IDS, heads=["1.2"], loss=likes_token, steps=1, rate=0.5)
    step = (found.offset - start.offset).values
    np.testing.assert_allclose(np.abs(step[1, 2]), 0.5, rtol=1e-3)
    step[1, 2] = 0
    assert not step.any()


def test_losses_of_texts_of_different_lengths_count_alike(pairs) -> None:
    model = pairs("gpt2").model
    texts = ["w5 w6 w7", "w8 w9", "w3 w4 w5"]
    found = analyses.fit_offsets(model, texts, heads="0.0", answer="w9", steps=1)
    alone = [-float(model([t])[0, -1].log_softmax(-1)[9]) for t in texts]
    assert float(found.loss_before) == pytest.approx(np.mean(alone), rel=1e-5)
    plain = analyses.fit_offsets(model, texts, heads="0.0", steps=1)
    assert float(plain.loss_before) == pytest.approx(float(model.loss(texts).mean()), rel=1e-5)


def test_controls_and_refusals(pairs) -> None:
    model = pairs("gpt2").model
    answers = {"examples": ["w9"], "test": ["w9"], "other": ["w11"]}
    found = offset_controls(model, IDS, IDS + 1, IDS + 2, answers=answers, draws=1, steps=5, rate=0.05)
    assert found.dims == ("heads", "draw")
    assert (found.sel(heads="own") < found.sel(heads="none")).all()
    with pytest.raises(HeadError, match=r"no such head: 9\.9"):
        analyses.fit_offsets(model, IDS, heads="9.9")
    with pytest.raises(AnalysisError, match="count=99, but there are 12 heads"):
        analyses.fit_offsets(model, IDS, heads="random", count=99)
