"""The weights of a block: a range of columns, or some chosen for each row, under every kind of edit.

Any part of a map comes from its state alone: held against the dense float64 reference, and against the whole map.

Mutations seen to fail here: chosen keys of key head 0 for all heads, a pattern read at the columns of its own map, rows
of padding left live, heads in another order than asked.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import cases, wanted
from comparison import near
from hypothesis import given, settings, strategies as st
from small_edits import ALL, CAUSAL, EVERY, FIRST, HEADS, ODD, PER_ROW, SOME, N, dense, operands

from headwater.kernels.attend import attend
from headwater.kernels.edits.patterns import Fixed, Matching, Offset, OfMap, OnKeys, Uniform
from headwater.kernels.edits.scores import BiasKeys, BlockScores, EmphasiseScores, MaskScores, ScaleScores
from headwater.kernels.edits.weights import MixIdentity, MixPattern, Rescale, Shares
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask

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


def other_map() -> MapState:
    q, k, v = (x[:, :, 1:] for x in operands())
    return attend(q, k, v, ScoreRule(0.6, Mask(N - 1, N - 1, right=0, query_offset=1, key_offset=1)))[1]


WEIGHTS = torch.rand(2, 1, N - 2, N - 1, generator=torch.Generator().manual_seed(1))
EDITS = {
    "none": ((), ()),
    "temperature": ((ScaleScores(SOME, 0.5),), ()),
    "key bias": ((BiasKeys(PER_ROW, torch.arange(2 * HEADS * N).reshape(2, HEADS, N) / 9),), ()),
    "blocked": ((BlockScores(SOME, ODD, FIRST),), ()),
    "emphasis": ((EmphasiseScores(SOME, ALL, ODD, 0.5),), ()),
    "function": ((MaskScores(SOME, lambda b, h, i, j: (i + j + h) % 3 != b),), ()),
    "rescaled": ((), (Rescale(SOME, FIRST, ~FIRST, 0.3),)),
    "identity": ((), (MixIdentity(PER_ROW, 0.4),)),
    "shares": ((), (Shares(EVERY),)),
    **{
        f"pattern {type(pattern).__name__}": ((), (MixPattern(SOME, 0.4, pattern),))
        for pattern in (
            Uniform(),
            Offset(2),
            OnKeys(ODD),
            Matching(torch.arange(2 * N).reshape(2, N) % 3),
            Fixed(WEIGHTS),
            OfMap(other_map()),
        )
    },
}


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("each", [(2, HEADS, N), (2, 1, N), (1, 1, 1)], ids=str)
def test_chosen_columns_have_the_weights_of_the_whole_row(kind, each):
    scores, weights = EDITS[kind]
    _, map = attend(*operands(), ScoreRule(0.6, CAUSAL, edits=scores), weights, "blocked")
    whole = dense(map)
    chosen = torch.randint(0, N, (*each, 4), generator=torch.Generator().manual_seed(5))
    for heads, rows in ((torch.arange(HEADS), slice(0, N)), (torch.tensor([2, 0]), slice(3, 6))):
        some = chosen if each[1] == 1 else chosen[:, heads]
        some = some if each[2] == 1 else some[:, :, rows]
        expected = torch.take_along_dim(whole[:, heads, rows], some, 3)
        found = map.block(Block(slice(0, 2), heads, rows, slice(0, N), some))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_rows_without_weights_are_marked_once():
    q, k, v = operands()
    mask = Mask(N, N, right=0, valid_queries=ODD, valid_keys=~FIRST)
    rule = ScoreRule(0.6, mask)
    lse = attend(q, k, v, ScoreRule(0.6, Mask(N, N, right=0, valid_keys=~FIRST)))[1].lse
    state = MapState.of(q, k, rule, torch.where(torch.isposinf(lse), -torch.inf, lse))
    assert torch.equal(torch.isposinf(state.lse), (~ODD | FIRST)[:, None].expand(2, HEADS, N))
    assert not dense(state)[:, :, ~ODD[0]].any()
    assert MapState.of(q, k, rule, torch.full_like(lse, torch.inf)).lse[:, :, 1].isnan().all()
