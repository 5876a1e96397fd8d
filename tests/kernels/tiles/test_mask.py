"""What a mask says of its rows and keys, against the definition pair by pair; documents against each by itself.

Mutations seen to fail here: documents forgotten where the band hides nothing, documents by column and not by position,
a window one key wider in `lower`, padding queries counted in `seen_by`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from comparison import near
from hypothesis import given, settings, strategies as st
from small_maps import HEADS, N, fitting, problem
from wide_cases import NORMALISERS

from headwater.kernels.attend import attend
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask

EVERY = pytest.mark.parametrize("kind", NORMALISERS, ids=str)


@st.composite
def masks(draw) -> Mask:
    """Bands with offsets, padding on either axis, documents and functions of the positions."""
    queries, keys = draw(st.integers(1, 7)), draw(st.integers(0, 7))
    offsets = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    left, right = (draw(st.sampled_from([None, None, None, -1, 0, 2])) for _ in range(2))
    flags = st.lists(st.booleans(), min_size=14, max_size=14)
    real_keys, real_queries = (torch.tensor([draw(flags), draw(flags)]) for _ in range(2))
    documents = torch.tensor(draw(flags)).cumsum(0)[None]
    return Mask(
        queries, keys, left, right, *offsets,
        valid_keys=draw(st.sampled_from([None, real_keys[:, :keys]])),
        valid_queries=draw(st.sampled_from([None, real_queries[:, :queries]])),
        documents=draw(st.sampled_from([None, documents])),
        extra=draw(st.sampled_from([None, lambda b, h, i, j: (i + 2 * j + b + h) % 3 != 0])),
    )  # fmt: skip


def sees(mask: Mask, b: int, h: int, row: int, column: int) -> bool:
    """The definition, for one pair."""
    i, j = row + mask.query_offset, column + mask.key_offset
    return (
        (mask.left is None or j >= i - mask.left)
        and (mask.right is None or j <= i + mask.right)
        and (mask.valid_keys is None or bool(mask.valid_keys[b, column]))
        and (mask.documents is None or int(mask.documents[0, i]) == int(mask.documents[0, j]))
        and (mask.extra is None or bool(mask.extra(*map(torch.tensor, (b, h, i, j)))))
    )


@settings(max_examples=200, deadline=None)
@given(masks())
def test_what_a_mask_says_is_its_definition_pair_by_pair(mask):
    shape = (2, 2, mask.queries, mask.keys)
    pairs = [sees(mask, *place) for place in itertools.product(*map(range, shape))]
    seen = torch.tensor(pairs, dtype=torch.bool).reshape(shape)
    whole = Block(slice(0, 2), torch.arange(2), slice(0, mask.queries), slice(0, mask.keys))
    tile = mask.tile(whole, torch.device("cpu"))
    assert torch.equal(seen, torch.ones(shape) > 0 if tile is None else tile.expand(shape))
    assert torch.equal(mask.visible_keys(2, 2).expand(shape[:3]), seen.sum(-1))
    counted = seen if mask.valid_queries is None else seen & mask.valid_queries[:, None, :, None]
    assert torch.equal(mask.seen_by(2, 2).expand(2, 2, -1), counted.sum(-2))
    if mask.keys:
        first = torch.where(seen.any(-1), seen.int().argmax(-1), mask.keys)
        assert torch.equal(mask.first_visible(2, 2).expand(shape[:3]), first)
    begin, end = mask.interior(whole.rows, whole.columns)
    assert seen[..., begin:end].all()
    first, last = mask.key_span(0, mask.queries)
    assert not seen[..., :first].any()
    assert not seen[..., last:].any()
    band = replace(mask, documents=None, extra=None)
    own = [
        [0 <= i + mask.shift < mask.keys and sees(band, b, 0, i, i + mask.shift) for i in range(mask.queries)]
        for b in range(2)
    ]
    assert mask.own_key().expand(2, -1).tolist() == own


@EVERY
def test_packed_documents_are_what_each_is_alone(kind):
    """No position is counted from the document's beginning: scores here do not depend on positions."""
    starts = torch.tensor([[0, 2, 7], [0, 5, 8]])
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 2]])
    q, k, v = problem()
    right = fitting(kind).right
    rule = ScoreRule(0.4, Mask(N, N, right=right, documents=ids), normaliser=kind, alibi=torch.rand(HEADS))
    together = attend(q, k, v, rule)[0]
    if kind.name == "sinkhorn":
        return  # its marginals are of the whole sequence
    for b in range(2):
        for begin, end in zip(starts[b].tolist(), [*starts[b, 1:].tolist(), N], strict=True):
            part = [x[b : b + 1, :, begin:end] for x in (q, k, v)]
            alone = attend(*part, replace(rule, mask=Mask(end - begin, end - begin, right=right)))[0]
            near(together[b : b + 1, :, begin:end], alone, 1e-12)


def test_documents_of_the_wrong_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"whole numbers \[batch, at least 9 positions\], got torch.int64 \(1, 4\)"
    ):
        Mask(4, 4, query_offset=5, documents=torch.zeros(1, 4, dtype=torch.long))
