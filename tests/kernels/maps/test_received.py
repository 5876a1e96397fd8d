"""Received mass of all and of some queries, by independent routes: dense, in blocks of rows, as products.

Mutations seen to fail here: `far` left out of the band, `near` excluded, the range's end included, a band's left limit
replaced instead of narrowed in `visible`, padding counted as queries.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from attention_cases import cases, sees_something
from comparison import close
from hypothesis import HealthCheck, given, settings, strategies as st
from limits import block_elements

from headwater.kernels.attend import attend
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

PROFILE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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
    with block_elements(elements):
        _, map = attend(case.q, case.k, case.v, case.rule, case.edits)
        found, count = map.received(queries, later), map.visible(queries, later)
        picked = [map.shape[1] - 1, 0]
        part = map.received(queries, later, heads=picked)
    wanted, seen = reference.received(
        sees_something(case), case.rule, None if mask is None else mask[None], later
    )
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


@pytest.mark.parametrize(
    "mask", [Mask(1, 1, query_offset=3), Mask(2, 2, key_offset=5), Mask(3, 2, query_offset=40)]
)
def test_keys_far_from_every_query_are_received_too(mask):
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, mask.queries, 4), torch.randn(1, 2, mask.keys, 4)
    _, map = attend(q, k, k, ScoreRule(1.0, mask, softcap=5.0), (), "blocked")
    torch.testing.assert_close(map.received(), map.dense().sum(-2))
    torch.testing.assert_close(map.received(), map.statistic("received"))


def test_received_of_arguments_out_of_range():
    q = torch.randn(2, 2, 5, 4)
    _, map = attend(q, q, q, ScoreRule(1.0, Mask(5, 5, right=0)))
    with pytest.raises(ValueError, match=r"near <= far .* got \(3, 1\)"):
        map.received(later=(3, 1))
    with pytest.raises(ValueError, match="slice without a step"):
        map.received(slice(0, 5, 2))
    with pytest.raises(ValueError, match=r"batch=2, query=5; got bool \(3, 5\)"):
        map.visible(torch.ones(3, 5, dtype=torch.bool))
    none = torch.zeros(5, dtype=torch.bool)
    assert (map.received(none, later=(1, 2)) == 0).all()
    assert (map.visible(none) == 0).all()


@PROFILE
@given(cases(plain=True))
def test_three_routes_to_received_mass_agree(case):
    """Column sums by streaming, by the transposed fused call, and from the map."""
    _, map = attend(case.q, case.k, case.v, case.rule)
    ones = torch.ones(map.shape[2], 1)
    streamed = map.statistic("received")
    close((map.T @ ones)[..., 0], streamed, 33, "transposed")
    close(map.dense().sum(-2), streamed, 33, "dense")


def test_few_queries_on_a_long_cache_take_no_dense_tile():
    """Seen to fail with blocks of all rows: that is the whole map in float32, 0.27 GB for one head."""
    code = """
import resource, torch
from headwater.kernels.attend import attend
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
few, many = 512, 131072
q, k, v = torch.randn(1, 1, few, 8), torch.randn(1, 1, many, 8), torch.randn(1, 1, many, 8)
with torch.no_grad():
    _, map = attend(q, k, v, ScoreRule(0.3, Mask(few, many, right=0, query_offset=many - few)))
    map.received(slice(0, 8))
    before = peak()
    found = map.received()
    statistics = map.statistics(("entropy", "max", "received"))
print(peak() - before, float(found.sum()), float(statistics["received"].sum()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, received, walked = map(float, done.stdout.split())
    assert received == pytest.approx(512, rel=1e-4)
    assert walked == pytest.approx(512, rel=1e-4)
    assert grown < 512 * 131072 * 4 / 2
