"""Patterns in fused kernels: their products alone, and edited maps on `flash`, against the dense float64 reference.

Mutations seen to fail here: hidden keys counted in a range, the own token taken for an earlier one, a window's lower
bound ignored, keys of the transpose left in sorted order, the mass of a pattern left out when a later edit settles, a
later edit not applied to the pattern, an earlier pattern not shrunk by the next, a row of padding that keeps a pattern.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, cases
from comparison import near
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from wide_cases import Drawn, Shape, pattern, weight_edit

from headwater.kernels.attend import attend
from headwater.kernels.backends import blocked, flash, pattern_products
from headwater.kernels.backends.choose import choose_for
from headwater.kernels.edits.patterns import Matching, Offset, OnKeys, Uniform
from headwater.kernels.edits.weights import MixPattern
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

FUSED = ("rescale", "identity", "pattern", "pattern")  # the weight edits that are factors of key classes
PROFILE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def _every_case_runs(monkeypatch):
    monkeypatch.setattr(flash, "MOST_CALLS", 99)
    # what the tests set themselves ends with them
    monkeypatch.setattr(pattern_products, "SUMS", pattern_products.SUMS)


def drawn_for(case: Case, data) -> Drawn:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    return Drawn(data.draw, generator, Shape(*case.q.shape[:3], case.k.shape[2]))


@PROFILE
@given(cases(), st.data(), st.sampled_from([1, 2**22]))
def test_products_with_a_pattern_are_those_of_its_dense_form(case, data, sums):
    pattern_products.SUMS = sums
    mask = case.rule.mask
    assume(mask.is_band)
    if mask.query_offset and data.draw(st.booleans()):
        # the cache has lost its first keys
        mask = replace(mask, query_offset=mask.query_offset + 3, key_offset=3)
    rule = replace(case.rule, mask=mask)
    drawn = drawn_for(case, data)
    kind = pattern(drawn, mask)
    batch, heads, queries, keys = drawn.shape
    dense = reference.pattern(kind, rule, batch, heads)
    x = torch.randn(batch, data.draw(st.sampled_from([1, case.k.shape[1], heads])), keys, 3)
    y = torch.randn(batch, heads, queries, 3)
    ones = torch.ones(batch, heads, keys, 1)
    total = pattern_products.gather(kind, mask, heads, ones).expand(batch, heads, -1, -1)
    share = torch.where(total > 0, 1.0 if kind.as_it_is else 1 / total.clamp_min(1e-9), 0.0)
    wanted = dense @ x.repeat_interleave(heads // x.shape[1], 1).double()
    found = pattern_products.gather(kind, mask, heads, x)
    near(found.repeat_interleave(heads // found.shape[1], 1) * share, wanted, 1e-5, "T @ x")
    near(pattern_products.scatter(kind, mask, share * y), dense.mT @ y.double(), 1e-4, "T^T @ y")


@pytest.mark.parametrize("n", [-3, -1, 0, 1, 4, 30])
@pytest.mark.parametrize(
    "mask",
    [
        Mask(20, 20, left=2, right=0),
        Mask(20, 20, right=2),
        Mask(9, 20, right=0, query_offset=14, key_offset=3),
        Mask(20, 9),
    ],
    ids=["window", "ahead", "moved cache", "cross"],
)
def test_an_offset_beyond_the_band_has_no_weight(mask, n):
    torch.manual_seed(0)
    rule = ScoreRule(1.0, mask)
    dense = reference.pattern(Offset(n), rule, 1, 1)
    x, y = torch.randn(1, 1, mask.keys, 2), torch.randn(1, 1, mask.queries, 2)
    near(pattern_products.gather(Offset(n), mask, 1, x), dense @ x.double(), 1e-6, "T @ x")
    near(pattern_products.scatter(Offset(n), mask, y), dense.mT @ y.double(), 1e-6, "T^T @ y")


@PROFILE
@given(cases(plain=True), st.data())
def test_edited_maps_with_patterns_agree_with_the_reference(case, data):
    drawn = drawn_for(case, data)
    some = [weight_edit(drawn, case.rule, FUSED) for _ in range(data.draw(st.integers(0, 3)))]
    some.append(
        MixPattern(drawn.heads(), drawn.among(0.3, 1.0), pattern(drawn, case.rule.mask), drawn.rows())
    )
    # what comes after a pattern moves its mass too
    some += [weight_edit(drawn, case.rule, FUSED) for _ in range(data.draw(st.integers(0, 2)))]
    # ordinary scores: what float32 leaves of tiny weights is tests/kernels/backends/test_flash.py's
    q = torch.randn(case.q.shape, generator=drawn.generator)
    case = replace(case, q=q, edits=tuple(some))
    reason = flash.Flash().why_not(q, case.k, case.rule, some)
    assume(reason != "edits of more than 16 classes of keys")
    assert reason is None
    z, map = attend(q, case.k, case.v, case.rule, case.edits, "flash")
    dense = reference.attend(q, case.k, case.v, case.rule, case.edits)
    near(z, dense.z, 1e-4, "z")
    weights = dense.weights
    if (valid := case.rule.mask.valid_queries) is not None:
        weights = weights * valid[:, None, :, None]
    steps = blocked.attend(q, case.k, case.v, case.rule, case.edits)[2]
    live = ~torch.isinf(map.lse)
    for mine, theirs in zip(map.steps, steps, strict=True):
        for a, b in zip(mine.factors, theirs.factors, strict=True):
            near(a[live], b[live], 1e-3, "factor")
    batch, heads, queries, keys = map.shape
    x, y = torch.randn(batch, heads, keys, 2), torch.randn(batch, heads, queries, 2)
    assert choose_for(map).name == "flash"
    near(map @ x, weights @ x.double(), 1e-4, "P @ x")
    if choose_for(map, transposed=True).name == "flash":
        near(map.T @ y, weights.mT @ y.double(), 1e-3, "P^T @ y")
        near(map.received(), weights.sum(-2), 1e-3, "received")


@pytest.mark.parametrize("kind", ["uniform", "offset", "keys", "matching"])
def test_a_pattern_takes_linear_memory(kind, monkeypatch):
    """No tile of a pattern is made: it is a range of keys."""
    length = 3000
    made = {
        "uniform": Uniform(),
        "offset": Offset(2),
        "keys": OnKeys(torch.arange(length)[None] % 5 == 0),
        "matching": Matching(torch.arange(length)[None] % 7),
    }[kind]
    monkeypatch.setattr(type(made), "tile", None)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 8) for _ in range(3))
    rule = ScoreRule(0.3, Mask(length, length, right=0))
    edits = (MixPattern(torch.tensor([True, False]), 1.0, made),)
    z, map = attend(q, k, v, rule, edits)
    assert choose_for(map).name == "flash"
    rows = torch.arange(length)
    seen = rows[:, None] >= rows
    given = {
        "uniform": seen,
        "offset": rows[:, None] - 2 == rows,
        "keys": seen & (rows % 5 == 0),
        "matching": (rows[:, None] > rows) & ((rows[:, None] - rows) % 7 == 0),
    }[kind].float()
    some = given.sum(-1) > 0
    wanted = (given @ v[0, 0]) / given.sum(-1, keepdim=True)
    near(z[0, 0, some], wanted[some], 1e-5, "z")
    assert torch.equal(z[0, 1], attend(q, k, v, rule)[0][0, 1]), "the other head"
