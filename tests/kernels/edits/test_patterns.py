"""Closed forms of the patterns that weights are mixed with.

Mutations seen to fail here: a pattern that is not normalised, the own position as a match, positions without the
cache's offset.
"""

from __future__ import annotations

import pytest
import torch
from comparison import near
from small_edits import CAUSAL, EVERY, HEADS, PER_ROW, N, dense, operands, run

from headwater.kernels.attend import attend
from headwater.kernels.edits.patterns import Fixed, Matching, Offset, OfMap, Uniform
from headwater.kernels.edits.weights import MixIdentity, MixPattern
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask


def test_the_offset_pattern_of_zero_is_the_identity():
    for amount in (0.3, 1.0):
        mixed = run(weights=(MixPattern(PER_ROW, amount, Offset(0)),))
        same = run(weights=(MixIdentity(PER_ROW, amount),))
        near(mixed[0], same[0])
        near(mixed[1], same[1])


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
