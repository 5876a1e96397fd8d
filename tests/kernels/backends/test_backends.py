"""What holds for every backend alike: rows do not mix, extreme scores stay finite, gradients are the reference's.

What a backend is says `backend.py`; the reference takes part as the one in `reference.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import cases
from comparison import close
from hypothesis import HealthCheck, given, settings

from headwater.kernels.attend import attend
from headwater.kernels.edits.weights import Rescale
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

PROFILE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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


def test_a_map_after_the_reference_is_read_by_the_others():
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, h, 7, 4) for h in (4, 2, 2))
    rule, first = (
        ScoreRule(0.5, Mask(7, 7, right=0), normaliser=Normaliser("softmax1")),
        torch.arange(7)[None] < 2,
    )
    edit = Rescale(torch.arange(4) < 2, first, ~first, 0.3)
    z, map = attend(q, k, v, rule, (edit,), "reference")
    assert map.backend == "auto"
    expected = reference.attend(q, k, v, rule, (edit,))
    torch.testing.assert_close(z, expected.z.float())
    torch.testing.assert_close(map.dense(), expected.weights.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close((map @ v.repeat_interleave(2, 1)).float(), z, atol=1e-6, rtol=0)
