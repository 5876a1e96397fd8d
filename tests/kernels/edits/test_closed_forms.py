"""Closed forms and laws of the kernels' edits and patterns; neutral values change no bit.

Mutations seen to fail here: a pattern that is not normalised, patterns and identity on rows without weights, heads of
batch row 0 for all rows, rows of head 0 for all heads, a condition's share reversed or its least mass ignored, the own
position as a match, positions without the cache's offset, hidden pairs that a later edit scales.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headwater.kernels.attend import attend
from headwater.kernels.backends import blocked
from headwater.kernels.edits import (
    BiasKeys,
    BlockScores,
    EmphasiseScores,
    MaskScores,
    MixIdentity,
    MixPattern,
    OffsetOutput,
    ReplaceOutput,
    Rescale,
    RowCondition,
    ScaleScores,
    ScoreEdit,
    WeightEdit,
)
from headwater.kernels.edits.patterns import Fixed, Matching, Offset, OfMap, Uniform
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask

HEADS, N = 3, 7
EVERY, SOME = torch.ones(HEADS) > 0, torch.tensor([True, False, True])
PER_ROW = torch.tensor([[True, False, False], [False, True, True]])
ALL = torch.ones(1, N) > 0
CAUSAL = Mask(N, N, right=0)
FIRST = torch.arange(N)[None] == 0
ODD = torch.arange(N)[None] % 2 == 1


def operands(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, HEADS, N, 4, generator=generator, dtype=dtype) for _ in range(3)]


def run(
    scores: tuple[ScoreEdit, ...] = (), weights: tuple[WeightEdit, ...] = (), mask: Mask = CAUSAL, **rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and map under edits, through the blocks."""
    z, map = attend(*operands(), ScoreRule(0.6, mask, edits=scores, **rule), weights, "blocked")
    return z, dense(map)


def dense(map: AttentionMap) -> torch.Tensor:
    return map.block(Block(slice(0, 2), torch.arange(HEADS), slice(0, map.shape[2]), slice(0, map.shape[3])))


def near(found, expected, error=1e-12):
    torch.testing.assert_close(found.double(), expected.double(), atol=error, rtol=error)


NEUTRAL_SCORES = [
    ScaleScores(SOME, 1.0),
    BlockScores(EVERY, torch.ones(1, N) > 2, ALL),
    BiasKeys(PER_ROW, torch.zeros(1, N)),
    EmphasiseScores(EVERY, ALL, ODD, 0.0),
    MaskScores(PER_ROW, lambda b, h, i, j: j <= i),
]
NEUTRAL_WEIGHTS = [
    Rescale(PER_ROW, FIRST, ~FIRST, 1.0),
    Rescale(EVERY, FIRST, ~FIRST, 0.3, rows=torch.zeros(1, 1, N) > 0),
    Rescale(EVERY, FIRST, ~FIRST, 0.3, condition=RowCondition(FIRST, ALL, 1.0, 1.5)),
    MixIdentity(EVERY, 0.0),
    MixPattern(EVERY, 0.0, Uniform()),
    MixPattern(PER_ROW, 0.0, Offset(1)),
    MixPattern(EVERY, 0.7, Offset(N)),
    MixPattern(EVERY, 0.7, Fixed(torch.zeros(1, 1, N, N))),
]


@pytest.mark.parametrize("edit", NEUTRAL_SCORES + NEUTRAL_WEIGHTS, ids=lambda e: type(e).__name__)
def test_a_neutral_edit_changes_no_bit(edit):
    on_scores = isinstance(edit, ScoreEdit)
    z, map = run((edit,) if on_scores else (), () if on_scores else (edit,))
    plain, plain_map = run()
    assert torch.equal(z, plain)
    assert torch.equal(map, plain_map)


def test_a_key_bias_is_what_copies_of_the_key_would_do():
    """exp(s + ln 3) = 3 exp(s); the bias of one head reaches no other."""
    q, k, v = operands()
    bias = torch.zeros(2, HEADS, N)
    bias[1, 2, 4] = math.log(3)
    z, _ = run((BiasKeys(EVERY, bias),))
    plain, _ = run()
    assert torch.equal(z[0], plain[0])
    assert torch.equal(z[1, :2], plain[1, :2])
    k3, v3 = (torch.cat([x[1:, 2:], x[1:, 2:, 4:5], x[1:, 2:, 4:5]], 2) for x in (k, v))
    scores = 0.6 * q[1:, 2:] @ k3.mT
    later = torch.cat([torch.arange(N), torch.tensor([4, 4])])[None] > torch.arange(N)[:, None]
    near(z[1:, 2:], scores.masked_fill(later, -torch.inf).softmax(-1) @ v3, 1e-7)


def test_emphasis_raises_scores_of_either_sign():
    q, k, _ = operands()
    scores = 0.6 * q @ k.mT
    raised = torch.where(ODD[:, None, None, :], scores + 0.7 * scores.abs(), scores)
    expected = raised.masked_fill(torch.ones(N, N).triu(1) > 0, -torch.inf).softmax(-1)
    _, map = run((EmphasiseScores(SOME, ALL, ODD, 0.7),))
    near(map[:, SOME], expected[:, SOME])
    assert torch.equal(map[:, 1], run()[1][:, 1])


def test_a_mask_of_pairs_is_the_mask_of_the_rule():
    def visible(b, h, i, j):
        return (i + 2 * j + b) % 3 != 0

    _, map = run((MaskScores(EVERY, visible),))
    _, expected = run(mask=replace(CAUSAL, extra=visible))
    assert torch.equal(map, expected)
    # positions are absolute: a cache that has lost its first key, which no query sees
    late = Mask(2, N - 1, right=0, query_offset=N - 2, key_offset=1)
    q, k, v = operands()
    edit = MaskScores(EVERY, lambda b, h, i, j: visible(b, h, i, j) & (j > 0))
    part = attend(q[:, :, -2:], k[:, :, 1:], v[:, :, 1:], ScoreRule(0.6, late, edits=(edit,)), (), "blocked")[
        1
    ]
    near(dense(part), run((edit,))[1][:, :, -2:, 1:])


@pytest.mark.parametrize(
    "after",
    [ScaleScores(EVERY, 0.0), ScaleScores(EVERY, -1.0), EmphasiseScores(EVERY, ALL, ALL, 1.0)],
    ids=str,
)
def test_what_is_hidden_stays_hidden(after):
    _, map = run((BlockScores(SOME, ALL, FIRST), after))
    assert map.isfinite().all()
    assert (map[:, SOME][..., 0] == 0).all()
    near(map[:, SOME, 1:].sum(-1), torch.ones(2, 2, N - 1))
    # a row of which nothing is left has no weights, and no later edit gives it any
    z, map = run(
        (BlockScores(SOME, ALL, FIRST),), (MixIdentity(EVERY, 0.5), MixPattern(EVERY, 0.5, Uniform()))
    )
    assert (z[:, SOME, 0] == 0).all()
    assert (map[:, SOME, 0] == 0).all()


def test_the_offset_pattern_of_zero_is_the_identity():
    for amount in (0.3, 1.0):
        mixed = run(weights=(MixPattern(PER_ROW, amount, Offset(0)),))
        same = run(weights=(MixIdentity(PER_ROW, amount),))
        near(mixed[0], same[0])
        near(mixed[1], same[1])


@pytest.mark.parametrize("elements", [1, 2**19])
def test_the_identity_is_not_mixed_in_where_the_band_hides_the_own_position(elements, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", elements)
    mask = Mask(N, N, right=-1)
    plain, mixed = run(mask=mask)[0], run(weights=(MixIdentity(EVERY, 0.5),), mask=mask)[0]
    near(mixed, plain)
    exact = reference.attend(*operands(), ScoreRule(0.6, mask), (MixIdentity(EVERY, 0.5),))
    near(mixed, exact.z)


def test_offsets_lie_before_the_query_where_that_is_visible():
    _, map = run(weights=(MixPattern(EVERY, 1.0, Offset(2)),), mask=Mask(N, N, left=2, right=0))
    near(map[:, :, 2:], torch.eye(N)[: N - 2].expand(2, HEADS, -1, -1))
    plain = run(mask=Mask(N, N, left=2, right=0))[1]
    assert torch.equal(map[:, :, :2], plain[:, :, :2])
    _, ahead = run(weights=(MixPattern(EVERY, 1.0, Offset(-1)),), mask=Mask(N, N))
    near(ahead[:, :, :-1], torch.eye(N)[1:].expand(2, HEADS, -1, -1))
    _, hidden = run(weights=(MixPattern(EVERY, 1.0, Offset(-1)),))
    assert torch.equal(hidden, run()[1])


def test_toward_uniform_all_the_way_is_the_mean_of_what_is_seen():
    z, _ = run(weights=(MixPattern(EVERY, 1.0, Uniform()),))
    v = operands()[2]
    near(z, v.cumsum(2) / torch.arange(1, N + 1)[:, None])


def test_matching_tokens_share_the_weight_of_the_query():
    ids = torch.tensor([[5, 6, 5, 5, 6, 7, 5]])
    _, map = run(weights=(MixPattern(EVERY, 1.0, Matching(ids)),))
    plain = run()[1]
    expected = plain.clone()
    for row, columns in {2: [0], 3: [0, 2], 4: [1], 6: [0, 2, 3]}.items():
        expected[:, :, row] = 0
        expected[:, :, row, columns] = 1 / len(columns)
    near(map, expected)
    # a query past the known tokens, and a cache that has lost its first key
    late = Mask(3, N - 1, right=0, query_offset=N - 3, key_offset=1)
    q, k, v = operands()
    edit = MixPattern(EVERY, 1.0, Matching(ids[:, :-1]))
    rule = ScoreRule(0.6, late)
    part = (q[:, :, -3:], k[:, :, 1:], v[:, :, 1:])
    map, unedited = (dense(attend(*part, rule, which, "blocked")[1]) for which in ((edit,), ()))
    assert map[0, 0, 0].tolist() == [1.0, 0, 0, 0, 0, 0]
    assert torch.equal(map[:, :, 1:], unedited[:, :, 1:])


def test_fixed_weights_are_read_at_positions_and_renormalised_over_what_is_seen():
    given = torch.zeros(1, 1, 5, 9)
    given[..., 3, :] = torch.tensor([0.0, 1, 3, 0, 7, 7, 7, 7, 7])
    given[..., 4, 5:] = 1.0
    _, map = run(weights=(MixPattern(EVERY, 0.5, Fixed(given)),))
    plain = run()[1]
    expected = plain.clone()
    expected[:, :, 3] = 0.5 * plain[:, :, 3] + 0.5 * torch.tensor([0, 0.25, 0.75, 0, 0, 0, 0])
    near(map, expected)
    with pytest.raises(ValueError, match=r"finite and not negative; got \(1, 1, 2, 2\) from -1 to 1"):
        Fixed(torch.tensor([[[[1.0, 0.0], [0.0, -1.0]]]]))


def test_a_transplanted_map_is_the_other_map():
    """Its output is the other map's weights on these values, sinks and all; rows it does not have stay."""
    q, k, v = operands()
    sinks = torch.tensor([1.0, 0.0, -1.0])
    other = attend(q.flip(1), k.flip(0), v, ScoreRule(0.9, CAUSAL, sinks=sinks))[1]
    z, map = run(weights=(MixPattern(EVERY, 1.0, OfMap(other)),))
    near(map, dense(other))
    near(z, dense(other) @ v)
    shorter = attend(q[:, :, :4].flip(1), k[:, :, :4], v[:, :, :4], ScoreRule(0.9, Mask(4, 4, right=0)))[1]
    _, map = run(weights=(MixPattern(EVERY, 1.0, OfMap(shorter)),))
    near(map[:, :, :4, :4], dense(shorter))
    assert torch.equal(map[:, :, 4:], run()[1][:, :, 4:])


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


def test_heads_may_differ_between_the_rows_of_a_batch():
    for scores, weights in (
        ((ScaleScores(PER_ROW, 0.5),), ()),
        ((BlockScores(PER_ROW, ALL, ODD),), ()),
        ((), (Rescale(PER_ROW, FIRST, ~FIRST, 0.2),)),
        ((), (MixPattern(PER_ROW, 0.5, Uniform()),)),
    ):
        found = run(scores, weights)[1]
        for b in range(2):
            alone = run(*(tuple(replace(e, heads=PER_ROW[b]) for e in part) for part in (scores, weights)))[1]
            assert torch.equal(found[b], alone[b])


def test_outputs_are_replaced_or_moved_on_the_heads_of_each_row():
    z, _ = run()
    positions = torch.arange(N)[None]
    values = torch.randn(2, HEADS, N, 4).double()
    chosen = PER_ROW[:, :, None, None]
    assert torch.equal(OffsetOutput(PER_ROW, values).apply(z, positions), torch.where(chosen, z + values, z))
    assert torch.equal(ReplaceOutput(PER_ROW, values).apply(z, positions), torch.where(chosen, values, z))
    one = OffsetOutput(EVERY, values[:1, :, :1]).apply(z, positions)
    assert torch.equal(one, z + values[:1, :, :1])
    late = OffsetOutput(EVERY, values).apply(z[:, :, :2], torch.tensor([[3, 5]]))
    assert torch.equal(late, z[:, :, :2] + values[:, :, [3, 5]])


@pytest.mark.parametrize("keep", [-0.1, 1.5])
def test_a_keep_that_would_turn_weights_negative_is_refused(keep: float):
    few = torch.arange(N) < 2
    with pytest.raises(ValueError, match=f"keep must be between 0 and 1; got {keep}"):
        Rescale(EVERY, few, ~few, keep)
