"""`AtSteps`: which steps it acts at, and what is refused; tests/lens/diffusion/ holds it to processors by hand."""

import pytest
import tiny_models
import torch

import headwater as hw

HEAD = hw.ScaleHeads({"0.0": 0.0})


@pytest.mark.parametrize(
    ("steps", "expected"),
    [("all", [0, 1, 2, 3]), (2, [2]), ([0, 3], [0, 3]), (slice(1, 3), [1, 2]), (slice(2, None), [2, 3])],
)
def test_steps_are_numbers_lists_and_slices(steps, expected):
    assert [n for n in range(4) if hw.AtSteps(HEAD, steps).at(n)] == expected


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: hw.AtSteps("0.0"), "of= is an edit"),
        (lambda: hw.AtSteps(hw.AtSteps(HEAD)), "of= is an edit"),
        (lambda: hw.AtSteps(HEAD, steps=-1), "steps are 'all'"),
        (lambda: hw.AtSteps(HEAD, steps=[0, 1.5]), "got 1.5"),
        (lambda: hw.AtSteps(HEAD, branch=1), "branch is 'all'"),
    ],
)
def test_what_can_not_be_read_is_refused(made, message):
    with pytest.raises(hw.HeadwaterError, match=message):
        made()


def test_other_models_have_no_steps():
    model = hw.load(tiny_models.tiny("llama"))
    with model.edit(hw.AtSteps(HEAD)), pytest.raises(hw.HeadwaterError, match="sampling run of a diffusion"):
        model(torch.tensor([[1, 2, 3]]))
    with pytest.raises(hw.HeadwaterError, match="EditResidual changes modules"):
        model.edit(hw.AtSteps(hw.EditResidual(1, "add", [0.3] * 32)))
    with pytest.raises(hw.HeadwaterError, match="names sinks"):
        model.edit(hw.AtSteps(hw.Redistribute("sinks:act", 0.5)))
