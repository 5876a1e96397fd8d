"""What is prepared once is not prepared again."""

from __future__ import annotations

import pytest
from small_maps import fitting, problem
from wide_cases import NORMALISERS

from headwater.kernels.rules.prepare import prepare
from headwater.kernels.rules.rule import ScoreRule

EVERY = pytest.mark.parametrize("kind", NORMALISERS, ids=str)


@EVERY
def test_what_is_prepared_needs_no_more_preparation(kind):
    q, k, _ = problem()
    once = prepare(q, k, ScoreRule(0.4, fitting(kind), normaliser=kind))
    again = prepare(*once)
    assert all(a is b for a, b in zip(once, again, strict=True))
