"""Frame knockout on the shipped model, held to runs under masks that are made by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.data.pictures import films
from headwater.lens.loading import zoo


@pytest.fixture(scope="module")
def model() -> hw.HookedModel:
    return hw.load("video-digits")


@pytest.fixture(scope="module")
def examples() -> list[hw.Example]:
    rng = random.Random(5)
    return [hw.Example(image=films.film(rng, held_out=True).frames()) for _ in range(30)]


def move(logits: torch.Tensor) -> torch.Tensor:
    return logits.view(-1, 10, 3).logsumexp(1)


def test_kept_and_divergence_are_those_of_a_run_under_a_mask_by_hand(model, examples):
    found = hw.analyses.frame_knockout(model, examples, read=move, controls=1, draws=10)
    tokens = model.to_tokens(examples)
    frame = torch.arange(64) // 16
    with model.edit(hw.MaskPairs(frame[:, None] == frame)):
        cut = move(model(tokens)).double().softmax(-1)
    plain = move(model(tokens)).double().softmax(-1)
    at = found.sel(treatment="other_frames")
    np.testing.assert_array_equal(at.per_example, plain.argmax(-1) == cut.argmax(-1))
    np.testing.assert_allclose(at.divergence, (plain * (plain / cut).log()).sum(-1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        found.hidden.sel(treatment=["other_frames", "own_frame", "random"]), [48 / 64, 15 / 64, 48 / 64]
    )


def test_the_movement_needs_other_frames_and_the_digit_does_not(model, examples):
    kept = {
        name: hw.analyses.frame_knockout(model, examples, read=read, controls=1, draws=10).kept
        for name, read in (("move", move), ("digit", lambda x: x.view(-1, 10, 3).logsumexp(2)))
    }
    assert kept["move"].sel(treatment="other_frames") < 0.7
    assert kept["digit"].sel(treatment="other_frames") > kept["move"].sel(treatment="other_frames")


def test_what_does_not_fit_is_told_in_a_line(model, examples):
    with pytest.raises(hw.HeadwaterError, match="has no classes"):
        hw.analyses.frame_knockout(hw.load(zoo.build("videomae")), torch.zeros(1, 4, 3, 16, 16))
    with pytest.raises(hw.HeadwaterError, match="at least two answers"):
        hw.analyses.frame_knockout(model, examples, read=lambda logits: logits[:, 0])
    with pytest.raises(hw.HeadwaterError, match="no numbers"):
        hw.analyses.frame_knockout(model, examples, read=lambda logits: logits * torch.nan)
    vit = hw.load("vit-digits")
    with pytest.raises(hw.HeadwaterError, match="no grid of several frames"):
        hw.analyses.frame_knockout(vit, hw.Example(image=np.zeros((8, 8), np.uint8)))
