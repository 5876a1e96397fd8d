"""Every backend against the dense float64 reference: outputs, lse, maps, products and statistics.

Mutations seen to fail here: window off by one, lower-right instead of upper-left alignment, sink left out of lse, mean
over the query group instead of per query head, key offset ignored, gain computed after the keys were scaled.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, cases
from hypothesis import HealthCheck, given, settings, strategies as st

from headwater.kernels.attend import attend, choose
from headwater.kernels.backends import blocked, flash
from headwater.kernels.maps import statistics
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

PROFILE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def close(actual, expected, scale=1.0, message=""):
    """float32 arithmetic against float64: rounding of the scores (up to about 100 here) enters the exponential."""
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        atol=3e-5 * scale,
        rtol=3e-5,
        equal_nan=True,
        msg=lambda m: f"{message}: {m}",
    )


def expected_map(case: Case) -> reference.Dense:
    dense = reference.attend(case.q, case.k, case.v, case.rule, case.edits)
    valid = case.rule.mask.valid_queries
    return dense if valid is None else dense._replace(weights=dense.weights * valid[:, None, :, None])


@PROFILE
@given(cases(), st.sampled_from([1, 40, 2**19]))
def test_blocked_agrees_with_the_reference(case, elements):
    before = blocked.BLOCK_ELEMENTS
    blocked.BLOCK_ELEMENTS = elements
    try:
        z, map = attend(case.q, case.k, case.v, case.rule, case.edits, "blocked")
        dense = expected_map(case)
        close(z, reference.attend(case.q, case.k, case.v, case.rule, case.edits).z, 5, "z")
        close(map.dense(), dense.weights, 1, "map")
        expected = reference.statistics(dense, case.rule, case.groups)
        found = map.statistics(statistics.NAMES, case.groups)
        assert set(found) == set(expected)
        for name in found:
            if name != "argmax":
                close(
                    found[name],
                    expected[name],
                    {
                        "distance": 40,
                        "distance_squared": 2000,
                        "windowed_distance": 10,
                        "lse": 10,
                        "entropy": 10,
                        "received": 33,
                    }.get(name, 1),
                    name,
                )
        places = found["argmax"]
        assert ((places >= 0) == (expected["argmax"] >= 0)).all()
        top = dense.weights.gather(-1, places.clamp_min(0)[..., None])[..., 0]
        close(top[places >= 0], expected["max"][places >= 0], 1, "argmax")
    finally:
        blocked.BLOCK_ELEMENTS = before


@PROFILE
@given(cases(plain=True))
def test_flash_agrees_with_the_reference(case):
    reason = flash.refuses(case.rule, case.q)
    assert reason is None
    z, map = attend(case.q, case.k, case.v, case.rule, (), "flash")
    dense = reference.attend(case.q, case.k, case.v, case.rule)
    close(z, dense.z, 5, "z")
    silent = torch.isinf(map.lse)
    close(map.lse[~silent], dense.lse[~silent], 10, "lse")
    close(map.dense(), expected_map(case).weights, 1, "map")


@PROFILE
@given(cases(), st.sampled_from([1, 3, 20]), st.booleans())
def test_products_agree_with_the_dense_map(case, columns, per_head):
    _, map = attend(case.q, case.k, case.v, case.rule, case.edits)
    weights = expected_map(case).weights
    batch, heads, queries, keys = map.shape
    x = torch.randn(batch, heads, keys, columns) if per_head else torch.randn(keys, columns)
    y = torch.randn(batch, heads, queries, columns) if per_head else torch.randn(batch, queries, columns)
    close(map @ x, weights @ x.double(), 5, "P @ x")
    close(map.T @ y, weights.mT @ (y if per_head else y[:, None]).double(), 30, "P^T @ y")


@PROFILE
@given(cases(plain=True))
def test_three_routes_to_received_mass_agree(case):
    """Column sums by streaming, by the transposed fused call, and from the map."""
    _, map = attend(case.q, case.k, case.v, case.rule)
    ones = torch.ones(map.shape[2], 1)
    streamed = map.statistic("received")
    close((map.T @ ones)[..., 0], streamed, 33, "transposed")
    close(map.dense().sum(-2), streamed, 33, "dense")


@PROFILE
@given(cases(edited=True))
def test_edited_rows_keep_their_mass(case):
    plain = reference.attend(case.q, case.k, case.v, case.rule).weights.sum(-1)
    _, map = attend(
        case.q, case.k, case.v, case.rule, tuple(e for e in case.edits if hasattr(e, "keep")), "blocked"
    )
    mass = map.statistic("row_mass")
    kept = ~mass.isnan()
    close(mass[kept], plain[kept], 1, "row mass")


@PROFILE
@given(cases())
def test_a_permutation_of_the_batch_changes_nothing(case):
    """Batch rows do not mix: a row alone gives what it gave in the batch."""
    of_rows = case.rule.sinks is not None and case.rule.sinks.dim() > 1
    if case.rule.mask.extra is not None or case.rule.bias is not None or of_rows:
        return  # these carry the batch index themselves
    z, _ = attend(case.q, case.k, case.v, case.rule, case.edits)
    mask = case.rule.mask
    one = {n: None if (t := getattr(mask, n)) is None else t[-1:] for n in ("valid_keys", "valid_queries")}

    def shift(e):
        return replace(e, **{n: t[-1:] for n in ("keys", "to") if (t := getattr(e, n, None)) is not None})

    rule = replace(case.rule, mask=replace(mask, **one), edits=tuple(shift(e) for e in case.rule.edits))
    alone, _ = attend(case.q[-1:], case.k[-1:], case.v[-1:], rule, tuple(shift(e) for e in case.edits))
    close(alone, z[-1:], 5)


@pytest.mark.parametrize("backend", ["flash", "blocked"])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_extreme_scores_stay_finite(backend, size):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 9, 4) * size, torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    z, map = attend(q, k, v, ScoreRule(1.0, Mask(9, 9, right=0)), (), backend)
    assert z.isfinite().all()
    # float32 knows scores of 1e4 to 1e-3, and with them the logarithm of every weight
    error = 1e-2 if size > 1 else 1e-5
    mass = map.statistic("row_mass")
    torch.testing.assert_close(mass, torch.ones_like(mass), atol=error, rtol=0)
    entropy = map.statistic("entropy")
    assert (entropy >= 0).all()
    assert (entropy <= torch.arange(1, 10).log() + error).all()


@pytest.mark.parametrize("backend", ["flash", "blocked"])
def test_gradients_equal_the_dense_ones_in_float64(backend):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, h, 7, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    rule = ScoreRule(0.5, Mask(7, 7, right=0))
    weight = torch.randn(2, 4, 7, 4, dtype=torch.float64)
    expected = torch.autograd.grad((reference.attend(q, k, v, rule).z * weight).sum(), (q, k, v))
    actual = torch.autograd.grad((attend(q, k, v, rule, (), backend)[0] * weight).sum(), (q, k, v))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=1e-8)


def test_a_backend_asked_for_by_name_refuses_by_name():
    q = torch.randn(1, 1, 9, 4)
    rule = ScoreRule(1.0, Mask(9, 9, left=2, right=0))
    with pytest.raises(ValueError, match="sliding window"):
        attend(q, q, q, rule, (), "flash")
    name, reason = choose(rule, q)
    assert name == "blocked"
    assert "sliding window" in reason
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        attend(q, q, q, rule, (), "fast")


def test_a_wrong_operand_is_refused_with_the_shapes():
    q = torch.randn(1, 1, 9, 4)
    _, map = attend(q, q, q, ScoreRule(1.0, Mask(9, 9)))
    assert isinstance(map, AttentionMap)
    with pytest.raises(ValueError, match=r"key=9; got \(8, 2\)"):
        map @ torch.randn(8, 2)
