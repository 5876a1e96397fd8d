"""Positions as numbers, in the forms a user may write them, counted in the real tokens of a row."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import EditError
from headwater.lens.naming import positions


def test_plain_forms_of_positions():
    assert positions.check(np.array([1, 2]), "x") == (1, 2) == positions.check(torch.tensor([1, 2]), "x")
    assert positions.check(range(3), "x") == (0, 1, 2)
    assert positions.of_row((1, slice(0, 2)), 5) == [1, 0, 1]
    assert positions.beyond(("token:a", 7, -9, 2), 5) == [7, -9]


@pytest.mark.parametrize("wrong", [["a", 2, 3], [0, 3, 0]])
def test_a_slice_of_other_things_than_numbers_is_refused(wrong):
    edit = hw.edit_from_dict({"edit": "Redistribute", "keys": {"slice": wrong}})
    with pytest.raises(EditError, match="Redistribute: keys: a slice is of whole numbers"):
        hw.load(tiny_models.tiny("gpt2")).edit(edit)
