"""Received mass of some queries, weights on chosen pairs and the farther row statistics, by independent routes.

Routes: the definition on the dense float64 map, blocks of rows, compositions of `P @ x` and `P^T @ y` (flash calls
where the map is plain), and closed forms pair by pair. Mutations seen to fail here: `far` left out of the band, `near`
excluded, the range's end included, a band's left limit replaced instead of narrowed in `visible`, padding counted as
queries, the shift of a cache ignored in `stripe`, key heads taken modulo the group in `at`, the diagonal of the
identity forgotten there, a soft-cap forgotten there, the clip taken of the distance squared, an occurrence in padding
followed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import cases
from hypothesis import HealthCheck, given, settings, strategies as st

from headwater.kernels.attend import attend
from headwater.kernels.backends import blocked
from headwater.kernels.maps import pairs
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

PROFILE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def close(actual, expected, scale=1.0, message=""):
    """float32 arithmetic against float64: rounding of the scores enters the exponential (test_backends.py)."""
    torch.testing.assert_close(
        actual.double(), expected.double(), atol=3e-5 * scale, rtol=3e-5, msg=lambda m: f"{message}: {m}"
    )  # fmt: skip


def dense_of(case) -> reference.Dense:
    """The dense map; rows that see no key have no weights, whatever an edit would keep there."""
    dense = reference.attend(case.q, case.k, case.v, case.rule, case.edits)
    return dense._replace(weights=torch.where(torch.isinf(dense.lse)[..., None], 0.0, dense.weights))


@st.composite
def some_queries(draw, queries: int):
    """As they are given to the map, and as a mask."""
    first = draw(st.integers(0, queries - 1))
    last = draw(st.integers(first, queries))
    rows = torch.arange(queries)
    inside = (rows >= first) & (rows < last)
    scattered = rows % draw(st.integers(2, 4)) == 0
    return draw(
        st.sampled_from(
            [(None, None), (slice(first, last), inside), (scattered, scattered), (inside[None], inside)]
        )
    )


later_windows = st.one_of(
    st.none(), st.tuples(st.integers(-6, 6), st.integers(0, 20)).map(lambda p: (p[0], p[0] + p[1]))
)


@PROFILE
@given(cases(), st.data(), later_windows, st.sampled_from([1, 40, 2**19]))
def test_received_and_visible_of_some_queries(case, data, later, elements):
    queries, mask = data.draw(some_queries(case.q.shape[2]))
    before, blocked.BLOCK_ELEMENTS = blocked.BLOCK_ELEMENTS, elements
    try:
        _, map = attend(case.q, case.k, case.v, case.rule, case.edits)
        found, count = map.received(queries, later), map.visible(queries, later)
        picked = [map.shape[1] - 1, 0]
        part = map.received(queries, later, heads=picked)
    finally:
        blocked.BLOCK_ELEMENTS = before
    wanted, seen = reference.received(dense_of(case), case.rule, None if mask is None else mask[None], later)
    close(found, wanted, 33, "received")
    close(part, wanted[:, picked], 33, "chosen heads")
    assert torch.equal(count, seen)
    if queries is None and later is None:
        close(found, map.statistic("received"), 33, "the statistic")
        assert torch.equal(count, map.statistic("visible"))


@PROFILE
@given(cases(), st.integers(-3, 3))
def test_parts_of_the_queries_add_up_and_are_products_with_indicators(case, near):
    """A route of its own: `P^T @ indicator`. Ranges, and windows of later queries, partition the whole."""
    _, map = attend(case.q, case.k, case.v, case.rule, case.edits)
    queries, keys = map.shape[2:]
    cut = queries // 2
    halves = [map.received(slice(0, cut)), map.received(slice(cut, queries))]
    indicator = torch.zeros(queries, 2)
    indicator[:cut, 0] = indicator[cut:, 1] = 1
    by_product = map.T @ indicator
    for i, half in enumerate(halves):
        close(half, by_product[..., i], 33, "indicator")
    whole = map.statistic("received")
    close(sum(halves), whole, 33, "ranges")
    far = queries + keys + 100
    windows = [(-far, near), (near + 1, near + 4), (near + 5, far)]
    close(sum(map.received(later=w) for w in windows), whole, 33, "windows")
    assert torch.equal(sum(map.visible(later=w) for w in windows), map.visible())


@PROFILE
@given(cases(), st.integers(-3, 6), st.integers(0, 2**31))
def test_weights_on_chosen_pairs(case, offset, seed):
    """Pair by pair and through blocks of rows, per head and for all heads alike."""
    _, map = attend(case.q, case.k, case.v, case.rule, case.edits)
    batch, heads, queries, keys = map.shape
    dense = dense_of(case)
    columns = torch.randint(
        -2, keys + 2, (batch, heads, queries, 3), generator=torch.Generator().manual_seed(seed)
    )
    for given_columns in (columns, columns[:, 0], columns[0, 0]):
        full = given_columns
        while full.dim() < 4:
            full = full[None] if full.dim() == 2 else full[:, None]
        full = full.expand(batch, heads, -1, -1)
        wanted = reference.at(dense, case.rule, full)
        close(map.at(given_columns), wanted, 1, "at")
        close(pairs._from_blocks(map, pairs._four(map, given_columns)), wanted, 1, "through blocks")
    own = (torch.arange(queries) + case.rule.mask.shift - offset)[None, None, :, None]
    close(
        map.stripe(offset),
        reference.at(dense, case.rule, own.expand(batch, heads, -1, 1))[..., 0],
        1,
        "stripe",
    )


@PROFILE
@given(cases(), st.integers(0, 12))
def test_farther_row_statistics_by_three_routes(case, window):
    """The pass; the dense definition; products with position columns, and stripes (|i-j| < W) with the row's mass."""
    q, k, v = case.q.double(), case.k.double(), case.v.double()
    _, map = attend(q, k, v, case.rule, case.edits)
    found = map.statistics(("distance_squared", "windowed_distance", "row_mass"), window=window)
    dense = dense_of(case)
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
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 20), st.booleans())
def test_the_column_after_the_previous_occurrence(seed, vocabulary, length, padded):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (3, length), generator=generator)
    start = torch.tensor([[0], [length // 3], [length]])
    valid = torch.arange(length) >= start
    found = pairs.after_previous(ids, valid if padded else None)
    for b in range(3):
        for i in range(length):
            real = [
                j
                for j in range(i)
                if ids[b, j] == ids[b, i] and (not padded or (valid[b, j] and valid[b, i]))
            ]
            assert found[b, i] == (real[-1] + 1 if real else -1)
    ends = torch.tensor([[5, 5, 5, 0]])
    assert pairs.after_previous(ends, torch.tensor([[True, True, False, False]])).tolist() == [
        [-1, 1, -1, -1]
    ]


def test_an_induction_head_shows_on_its_stripe():
    """Queries look where the token before was their own: the pattern is built so, and nothing else has the weight."""
    ids = torch.tensor([[4, 7, 9, 2, 4, 7, 9, 2]])
    previous = torch.nn.functional.one_hot(ids.roll(1, -1), 10).float()
    previous[:, 0] = 0
    q, k = 60.0 * torch.nn.functional.one_hot(ids, 10).float()[:, None], previous[:, None]
    _, map = attend(q, k, k, ScoreRule(1.0, Mask(8, 8, right=0)))
    found = map.at(pairs.after_previous(ids)[..., None])[0, 0, :, 0]
    close(found, torch.tensor([0.0] * 4 + [1.0] * 4))


@pytest.mark.parametrize(
    "mask", [Mask(1, 1, query_offset=3), Mask(2, 2, key_offset=5), Mask(3, 2, query_offset=40)]
)
def test_keys_far_from_every_query_are_received_too(mask):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, mask.queries, 4), torch.randn(1, 2, mask.keys, 4)
    _, map = attend(q, k, k, ScoreRule(1.0, mask, softcap=5.0), (), "blocked")
    torch.testing.assert_close(map.received(), map.dense().sum(-2))
    torch.testing.assert_close(map.received(), map.statistic("received"))


def test_one_row_of_padding_stands_for_the_batch():
    torch.manual_seed(0)
    q = torch.randn(3, 2, 5, 4)
    _, map = attend(q, q, q, ScoreRule(1.0, Mask(5, 5, right=0, valid_keys=(torch.arange(5) > 0)[None])))
    torch.testing.assert_close(
        map.stripe(1), torch.nn.functional.pad(map.dense().diagonal(-1, -2, -1), (1, 0))
    )


def test_memory_and_arguments_out_of_range():
    q = torch.randn(2, 2, 5, 4)
    _, map = attend(q, q, q, ScoreRule(1.0, Mask(5, 5, right=0)))
    assert isinstance(map, AttentionMap)
    with pytest.raises(ValueError, match=r"near <= far .* got \(3, 1\)"):
        map.received(later=(3, 1))
    with pytest.raises(ValueError, match="slice without a step"):
        map.received(slice(0, 5, 2))
    with pytest.raises(ValueError, match=r"batch=2, query=5; got bool \(3, 5\)"):
        map.visible(torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"query=5; got \(4, 1\)"):
        map.at(torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="0 tokens or more; got -1"):
        map.statistic("windowed_distance", window=-1)
    none = torch.zeros(5, dtype=torch.bool)
    assert (map.received(none, later=(1, 2)) == 0).all()
    assert (map.visible(none) == 0).all()
    one = replace(map, q=map.q[:, :, :0], lse=map.lse[:, :, :0], rule=ScoreRule(1.0, Mask(0, 5)))
    assert one.at(torch.zeros(0, 3, dtype=torch.long)).shape == (2, 2, 0, 3)
