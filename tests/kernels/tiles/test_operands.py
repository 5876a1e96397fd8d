"""Operands and slices: what fits, and what is refused with the shapes that would."""

from __future__ import annotations

import pytest
import torch

from headwater.kernels.tiles.operands import operand, plain

SHAPE = (2, 3, 4, 5)


@pytest.mark.parametrize("given", [(5, 7), (2, 5, 7), (1, 5, 7), (2, 3, 5, 7), (2, 1, 5, 7)])
def test_axes_that_an_operand_lacks_are_added(given):
    x = torch.randn(given)
    found = operand(x, SHAPE, "key")
    assert found.shape == (2, given[1] if len(given) == 4 else 1, 5, 7)
    assert found[0, 0].equal(x.reshape(-1, 5, 7)[0])


@pytest.mark.parametrize(
    ("given", "axis"), [((4, 7), "key"), ((5, 7), "query"), ((3, 5, 7), "key"), ((5,), "key")]
)
def test_other_shapes_are_refused(given, axis):
    with pytest.raises(ValueError, match=rf"the operand must be \[{axis}, c\].* got \({given[0]},"):
        operand(torch.zeros(given), SHAPE, axis)


def test_slices():
    assert plain(slice(-2, None), 5, "rows") == slice(3, 5)
    assert plain(slice(4, 2), 5, "rows") == slice(4, 4)
    with pytest.raises(ValueError, match="rows must be a slice without a step"):
        plain(slice(0, 5, 2), 5, "rows")
