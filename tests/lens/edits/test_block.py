"""`model.edit(…)` is a block: used otherwise it says so, and what is no edit is refused with the mend."""

from __future__ import annotations

import gc

import pytest
import tiny_models

import headwater as hw
from headwater.lens.errors import EditError


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("gpt2"))


def test_edits_that_stand_alone_are_told_of(model):
    def alone():
        model.edit(hw.Temperature(2.0))
        gc.collect()

    with pytest.warns(UserWarning, match=r"changed nothing, because it stands alone; write `with model.edit"):
        alone()


def test_a_block_is_no_model(model):
    block = model.edit(hw.Temperature(2.0))
    with pytest.raises(EditError, match=r"a block and has no 'record'; write `with model.edit"):
        block.record([[1, 2, 3]])
    assert not hasattr(block, "generate")
    with block:
        assert len(model.edits) == 1
        with block:
            assert len(model.edits) == 2, "a block may be entered again"
    assert model.edits == ()


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        (
            hw.recipes.streaming(1, 4),
            r"edits one by one; got a list of 1.* model.edit\(\*edits\) with a star",
        ),
        ((hw.Temperature(2.0),), r"model.edit\(\*edits\)"),
        (hw.Temperature, r"got the class Temperature: give hw.Temperature\(…\)"),
        ({"edit": "Temperature", "tau": 2}, r"hw.edit_from_dict"),
        ("Temperature", "got 'Temperature'"),
        (None, "got None"),
    ],
)
def test_what_is_no_edit(model, given, mend):
    with pytest.raises(EditError, match=mend):
        model.edit(given)


def test_a_failing_edit_leaves_nothing_on(model):
    with pytest.raises(ZeroDivisionError), model.edit(hw.Temperature(2.0)):
        raise ZeroDivisionError
    assert model.edits == ()
