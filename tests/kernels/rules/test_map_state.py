"""Exact weights of any part of a map, from its state alone, against the dense float64 reference.

Mutation seen to fail here: heads in another order than asked.
"""

from __future__ import annotations

from dataclasses import replace

from attention_cases import cases, wanted
from comparison import near
from hypothesis import given, settings, strategies as st

from headwater.kernels.attend import attend

PROFILE = settings(max_examples=60, deadline=None)


@PROFILE
@given(cases(wide=True), st.data())
def test_any_tile_comes_from_row_factors_alone(case, data):
    """Edits are applied to a window that does not hold the rest of its rows."""
    case = replace(case, q=case.q.double(), k=case.k.double(), v=case.v.double())
    _, map = attend(case.q, case.k, case.v, case.rule, case.edits, "blocked")
    rows, columns = (
        slice(first := data.draw(st.integers(0, n - 1)), data.draw(st.integers(first + 1, n)))
        for n in map.shape[2:]
    )
    heads = data.draw(st.lists(st.integers(0, map.shape[1] - 1), min_size=1, unique=True))
    expected = wanted(case).weights[:, heads][:, :, rows, columns]
    near(map.tile(rows, columns, heads), expected, 1e-6, "tile")
