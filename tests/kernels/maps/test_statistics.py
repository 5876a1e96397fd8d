"""Statistics of rows by independent routes: one pass over the map, the dense definition, products, and laws.

What both walks measure (`measures.py`) is tested here, and in the lean walk's own file.

Mutations seen to fail here: the clip taken of the distance squared, the own position one column off.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from attention_cases import cases, sees_something
from comparison import close, near
from hypothesis import HealthCheck, given, settings, strategies as st
from small_maps import CAUSAL, HEADS, N, dense, map_of

from headwater.kernels.attend import attend
from headwater.kernels.maps import statistics
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

PROFILE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@PROFILE
@given(cases(), st.integers(0, 12))
def test_farther_row_statistics_by_three_routes(case, window):
    """The pass; the dense definition; products with position columns, and stripes (|i-j| < W) with the row's mass."""
    q, k, v = case.q.double(), case.k.double(), case.v.double()
    _, map = attend(q, k, v, case.rule, case.edits)
    found = map.statistics(("distance_squared", "windowed_distance", "row_mass"), window=window)
    dense = sees_something(case)
    wanted = reference.statistics(dense, case.rule, window=window)
    silent = wanted["row_mass"].isnan()
    for name in found:
        assert torch.equal(found[name].isnan(), silent)
        torch.testing.assert_close(found[name].double(), wanted[name], atol=1e-5, rtol=1e-5, equal_nan=True)
    queries, keys = map.shape[2:]
    own = torch.arange(queries) + case.rule.mask.shift
    place = torch.arange(keys).double()
    moments = map @ torch.stack([torch.ones(keys).double(), place, place**2], -1)
    squared = own**2 * moments[..., 0] - 2 * own * moments[..., 1] + moments[..., 2]
    torch.testing.assert_close(squared[~silent], wanted["distance_squared"][~silent], atol=1e-6, rtol=1e-6)
    nearer = sum((window - abs(o)) * map.stripe(o) for o in range(1 - window, window))
    clipped = window * moments[..., 0] - nearer
    torch.testing.assert_close(clipped[~silent], wanted["windowed_distance"][~silent], atol=1e-4, rtol=1e-5)


@PROFILE
@given(cases(edited=False), st.integers(1, 12), st.sampled_from([2, 5]))
def test_laws_that_need_no_reference(case, window, cell):
    """Mass is counted once however it is summed, and the moments of the distance bound each other."""
    _, map = attend(case.q, case.k, case.v, case.rule, case.edits)
    names = ("row_mass", "distance", "distance_squared", "windowed_distance", "received", "entropy", "max")
    found = map.statistics(names, window=window)
    mass = found["row_mass"].nan_to_num()
    close(found["received"].sum(-1), mass.sum(-1), 100, "mass")
    queries, keys = map.shape[2:]
    tall, wide = (
        torch.tensor([min(cell, n - i) for i in range(0, n, cell)]).float() for n in (queries, keys)
    )
    cells = map.pooled(cell, "mean") * tall[:, None] * wide
    close(cells.sum((-1, -2)), mass.sum(-1), 100, "cells")
    assert (map.pooled(cell, "max") <= 1).all()
    near, far, square, clip = (found[n].nan_to_num() for n in ("row_mass", *names[1:4]))
    assert (clip <= torch.minimum(far, window * near) + 1e-4).all()
    assert (far**2 <= near * square * (1 + 1e-4) + 1e-3).all(), "Jensen"
    real = ~found["max"].isnan()
    seen = map.rule.mask.visible_keys(*map.shape[:2]).expand(map.shape[:3])[real]
    assert (found["entropy"][real] >= -1e-5).all()
    assert (
        found["entropy"][real] <= seen.log() + (1 / torch.e if map.rule.sinks is not None else 0) + 1e-4
    ).all()
    if map.rule.sinks is None:
        close(mass[real], torch.ones_like(mass[real]), 3, "row mass")
        # scores of several hundred are known to 1e-5 of a weight
        assert (found["max"][real] >= 1 / seen - 1e-4).all()
        assert ((-found["entropy"][real]).exp() <= found["max"][real] + 1e-4).all()


@PROFILE
@given(cases(), st.permutations(list(statistics.OF_PAIRS)), st.integers(1, 3))
def test_one_weight_of_each_row_needs_no_pass_over_the_map(case, names, count):
    _, map = attend(case.q, case.k, case.v, case.rule, case.edits)
    wanted = reference.statistics(sees_something(case), case.rule)
    with mock.patch.object(MapState, "row_blocks_of", side_effect=AssertionError("a pass")):
        found = map.statistics(tuple(names[:count]))
    for name, values in found.items():
        close(values, wanted[name], 1, name)


def test_a_window_below_zero_is_refused():
    q = torch.randn(2, 2, 5, 4)
    _, map = attend(q, q, q, ScoreRule(1.0, Mask(5, 5, right=0)))
    with pytest.raises(ValueError, match="0 tokens or more; got -1"):
        map.statistic("windowed_distance", window=-1)


def test_the_entropy_of_signed_weights_is_refused_and_that_of_shares_is_not():
    map = map_of(CAUSAL, Normaliser("cog"))
    with pytest.raises(ValueError, match=r"entropy of weights that may be negative.*of='shares'"):
        map.statistic("entropy")
    weights = dense(map).abs()
    near(map.statistic("entropy", of="shares"), torch.special.entr(weights).sum(-1), 1e-6)
    near(map.statistic("row_mass"), dense(map).sum(-1), 1e-6)
    with pytest.raises(ValueError, match="'weights' or of 'shares'; got of='sizes'"):
        map.statistic("max", of="sizes")
    # a sink stays what it is under weights, and is left out of shares
    sunk = map_of(CAUSAL, None, sinks=torch.full((HEADS,), 2.0))
    assert (sunk.statistic("row_mass") < 0.9).any()
    near(sunk.statistic("row_mass", of="shares"), torch.ones(2, HEADS, N), 1e-5)
