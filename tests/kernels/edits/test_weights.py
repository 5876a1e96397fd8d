"""Closed forms and laws of the edits of weights; neutral values change no bit.

Mutations seen to fail here: patterns and identity on rows without weights, heads of batch row 0 for all rows, rows of
head 0 for all heads, a condition's share reversed or its least mass ignored.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from comparison import near
from limits import block_elements
from small_edits import ALL, CAUSAL, EVERY, FIRST, HEADS, ODD, PER_ROW, N, each_row_alone, operands, run

from headwater.kernels.attend import attend
from headwater.kernels.edits.patterns import Fixed, Offset, Uniform
from headwater.kernels.edits.weights import MixIdentity, MixPattern, Rescale, RowCondition, ScaleKeys
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

NEUTRAL_WEIGHTS = [
    Rescale(PER_ROW, FIRST, ~FIRST, 1.0),
    Rescale(EVERY, FIRST, ~FIRST, 0.3, rows=torch.zeros(1, 1, N) > 0),
    Rescale(EVERY, FIRST, ~FIRST, 0.3, condition=RowCondition(FIRST, ALL, 1.0, 1.5)),
    ScaleKeys(PER_ROW, FIRST, 1.0),
    ScaleKeys(EVERY, FIRST, 3.0, rows=torch.zeros(1, 1, N) > 0),
    MixIdentity(EVERY, 0.0),
    MixPattern(EVERY, 0.0, Uniform()),
    MixPattern(PER_ROW, 0.0, Offset(1)),
    MixPattern(EVERY, 0.7, Offset(N)),
    MixPattern(EVERY, 0.7, Fixed(torch.zeros(1, 1, N, N))),
]


@pytest.mark.parametrize("edit", NEUTRAL_WEIGHTS, ids=lambda e: type(e).__name__)
def test_a_neutral_edit_of_weights_changes_no_bit(edit):
    for found, plain in zip(run(weights=(edit,)), run(), strict=True):
        assert torch.equal(found, plain)


@pytest.mark.parametrize("elements", [1, 2**19])
def test_the_identity_is_not_mixed_in_where_the_band_hides_the_own_position(elements):
    mask = Mask(N, N, right=-1)
    with block_elements(elements):
        plain, mixed = run(mask=mask)[0], run(weights=(MixIdentity(EVERY, 0.5),), mask=mask)[0]
    near(mixed, plain)
    exact = reference.attend(*operands(), ScoreRule(0.6, mask), (MixIdentity(EVERY, 0.5),))
    near(mixed, exact.z)


def test_a_row_condition_compares_shares_of_mass():
    """The rule by which VAR picks image-centric rows, by hand."""
    of, within = torch.arange(N)[None] < 2, torch.arange(N)[None] < 5
    condition = RowCondition(of, within, most=0.45, least=0.6)
    edit = Rescale(EVERY, FIRST, ODD, 0.5, condition=condition)
    plain, map = run()[1], run(weights=(edit,))[1]
    chosen = 0
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(HEADS), torch.arange(N)).tolist():
        row = plain[b, h, i]
        inside = float(row[:5].sum())
        acts = float(row[:2].sum()) / (inside + 1e-6) <= 0.45 and inside >= 0.6 and i > 0
        expected = row.clone()
        if acts:
            chosen += 1
            freed = 0.5 * row[0]
            expected[0] -= freed
            expected[ODD[0]] += freed * row[ODD[0]] / row[ODD[0]].sum()
        near(map[b, h, i], expected)
    assert 0 < chosen < 2 * HEADS * N


def test_rows_limit_an_edit_to_some_queries():
    rows = torch.rand(2, HEADS, N, generator=torch.Generator().manual_seed(0)) < 0.5
    for edit in (
        Rescale(EVERY, FIRST, ~FIRST, 0.2),
        MixIdentity(EVERY, 0.4),
        MixPattern(EVERY, 0.4, Uniform()),
    ):
        everywhere, plain = run(weights=(edit,))[1], run()[1]
        some = run(weights=(replace(edit, rows=rows),))[1]
        assert torch.equal(some, torch.where(rows[..., None], everywhere, plain))
        assert not torch.equal(some, plain)


@pytest.mark.parametrize(
    "edit",
    [
        Rescale(PER_ROW, FIRST, ~FIRST, 0.2),
        ScaleKeys(PER_ROW, FIRST, 2.0),
        MixPattern(PER_ROW, 0.5, Uniform()),
    ],
)
def test_heads_of_a_weight_edit_may_differ_between_the_rows_of_a_batch(edit):
    each_row_alone(edit, lambda e: run(weights=(e,)))


def test_scaled_weights_change_the_sums_of_rows_and_statistics_are_of_them_as_they_are():
    """A row all of whose weights are scaled by r has the entropy r·H - r·ln r, and r times every sum."""
    plain, scaled, negative = (
        attend(*operands(), ScoreRule(0.6, CAUSAL), (ScaleKeys(EVERY, ALL, factor),))[1]
        for factor in (1.0, 2.5, -1.0)
    )
    names = ("row_mass", "entropy", "max", "distance", "received")
    before, after = plain.statistics(names), scaled.statistics(names)
    for name in {*names} - {"entropy"}:
        near(after[name], 2.5 * before[name], 1e-6, name)
    near(after["entropy"], 2.5 * before["entropy"] - 2.5 * math.log(2.5), 1e-6)
    near(scaled.statistic("entropy", of="shares"), before["entropy"], 1e-5)
    assert negative.signed
    with pytest.raises(ValueError, match="weights that may be negative is not defined"):
        negative.statistic("entropy")


@pytest.mark.parametrize("keep", [-0.1, 1.5])
def test_a_keep_that_would_turn_weights_negative_is_refused(keep: float):
    few = torch.arange(N) < 2
    with pytest.raises(ValueError, match=f"keep must be between 0 and 1; got {keep}"):
        Rescale(EVERY, few, ~few, keep)
