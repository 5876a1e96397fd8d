"""Agent attention as a product of two maps against its dense formula: products, windows, pairs, statistics.

The statistics are those of `weights_map.py`. Seen to fail: the factors in the other order, the transpose without
transposing both, padded queries that count, keys that no agent sees counted as visible.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparison import near
from hypothesis import given, settings, strategies as st

from headwater.kernels.attend import attend
from headwater.kernels.maps.statistics import NAMES
from headwater.kernels.mixers.product import ProductMap
from headwater.kernels.reference import dense as reference, mixers
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

SCALE = 0.7
NEVER = ("lse", "first")


def problem(seed: int, batch: int, heads: int, tokens: int, agents: int, keys: int):
    generator = torch.Generator().manual_seed(seed)
    q, a, k = (torch.randn(batch, heads, n, 4, generator=generator).double() for n in (tokens, agents, keys))
    valid_queries = torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    valid_keys = torch.arange(keys) < torch.randint(1, keys + 1, (batch, 1), generator=generator)
    handed = attend(q, a, a, ScoreRule(SCALE, Mask(tokens, agents, valid_queries=valid_queries)))[1]
    collected = attend(a, k, k, ScoreRule(SCALE, Mask(agents, keys, valid_keys=valid_keys)))[1]
    shown = (SCALE * a @ k.mT).masked_fill(~valid_keys[:, None, None], -torch.inf).softmax(-1)
    dense = (SCALE * q @ a.mT).softmax(-1) @ shown
    return ProductMap(handed, collected), dense, valid_queries, valid_keys


def test_agent_attention_is_a_product_of_two_softmaxes():
    map, dense, *_ = problem(0, 1, 2, 9, 3, 9)
    full = replace(map.keys.rule, mask=Mask(3, 9)), replace(map.queries.rule, mask=Mask(9, 3))
    whole = ProductMap(
        attend(map.queries.q, map.queries.k, map.queries.k, full[1])[1],
        attend(map.keys.q, map.keys.k, map.keys.k, full[0])[1],
    )
    expected = mixers.agents(map.queries.q, map.queries.k, map.keys.k, SCALE)
    near(whole.dense(), expected, 1e-9)
    near(whole.row_mass, torch.ones(1, 2, 9), 1e-6)
    assert not whole.signed
    assert dense.shape == whole.shape


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 4),
    st.booleans(),
)
def test_products_windows_and_statistics_are_those_of_the_dense_map(
    seed, batch, heads, tokens, agents, crossing
):
    keys = tokens + 3 if crossing else tokens
    map, dense, valid_queries, valid_keys = problem(seed, batch, heads, tokens, agents, keys)
    weights = dense * valid_queries[:, None, :, None]
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(batch, heads, n, 2, generator=generator).double() for n in (keys, tokens))
    near(map @ x, weights @ x, 1e-8, "P @ x")
    near(map.T @ y, weights.mT @ y, 1e-8, "P^T @ y")
    near(map.tile(slice(1, 3), slice(0, 2), [heads - 1]), weights[:, [heads - 1], 1:3, :2], 1e-6)
    columns = torch.randint(-1, keys + 1, (batch, heads, tokens, 3), generator=generator)
    inside = (columns >= 0) & (columns < keys)
    near(map.at(columns), torch.where(inside, weights.gather(-1, columns.clamp(0, keys - 1)), 0.0), 1e-6)
    # the definitions of the dense reference, on the same numbers
    rule = ScoreRule(1.0, Mask(tokens, keys, valid_keys=valid_keys, valid_queries=valid_queries))
    whole = reference.Dense(x, torch.zeros(batch, heads, tokens).double(), dense)
    groups = torch.rand(2, keys, generator=generator) < 0.5
    expected = reference.statistics(whole, rule, groups)
    relative = ("self", "previous", "distance", "distance_squared", "windowed_distance")
    names = [name for name in NAMES if name not in NEVER and not (crossing and name in relative)]
    found = map.statistics(names, groups)
    assert list(found) == names
    for name in names:
        if name != "argmax":
            near(found[name], expected[name], 1e-5, name)
    place = found["argmax"]
    assert (place >= 0).equal(valid_queries[:, None].expand_as(place))
    near(dense.gather(-1, place.clamp_min(0)[..., None])[..., 0] * valid_queries[:, None],
         expected["max"].nan_to_num(0.0), 1e-6)  # fmt: skip


def test_what_has_no_meaning_is_refused_by_name():
    map, *_ = problem(0, 1, 2, 5, 2, 7)
    for name, message in (
        ("lse", "ProductMap has no 'lse'"),
        ("first", "no 'first'"),
        ("distance", "same tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            map.statistics((name,))
    with pytest.raises(ValueError, match="unknown statistics"):
        map.statistics(("spread",))
    with pytest.raises(ValueError, match="needs groups of keys"):
        map.statistics(("mass",))
    with pytest.raises(ValueError, match="the keys of the first map are the queries of the second"):
        ProductMap(map.keys, map.keys)


def test_keys_that_no_agent_sees_are_not_visible():
    q, a, k = (torch.randn(1, 1, n, 4) for n in (4, 2, 6))
    # one agent for each half of the keys, and the last query sees the second agent alone
    halves = Mask(2, 6, extra=lambda b, h, i, j: j // 3 == i)
    last = Mask(4, 2, extra=lambda b, h, i, j: (i < 3) | (j == 1))
    map = ProductMap(attend(q, a, a, ScoreRule(1.0, last))[1], attend(a, k, k, ScoreRule(1.0, halves))[1])
    assert map.visible()[0, 0].tolist() == [3, 3, 3, 4, 4, 4]
    padded = replace(halves, valid_queries=torch.tensor([[True, False]]))
    map = ProductMap(attend(q, a, a, ScoreRule(1.0, last))[1], attend(a, k, k, ScoreRule(1.0, padded))[1])
    assert map.visible()[0, 0].tolist() == [3, 3, 3, 0, 0, 0]
