"""The arithmetic of `arithmetic.py`, and z and the log-sum-exp from `loops.py` by way of `walks.py`.

Seen to fail with an output that is not lowered when a larger score comes, with values of the strip before, and with a
tail of a row that is not cleared.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from plain_maps import MASKS, build

pytest.importorskip("numba", reason="the compiled loops need the extra [fast]")

from numba import njit

from headwater.kernels.compiled import walks
from headwater.kernels.compiled.arithmetic import ROWS, WIDE, products, weighed
from headwater.kernels.reference import dense as reference
from headwater.kernels.tiles.mask import Mask


def test_a_weight_is_a_power_of_two() -> None:
    scores = np.linspace(-130, 0, 5001).astype(np.float32)
    for score in scores:
        weight, y = weighed(score, np.float32(0), np.float32(0.75))  # pyright: ignore[reportGeneralTypeIssues]
        assert y == min(np.float32(-score * np.float32(0.75)), 127)
        exact = 2.0 ** -np.float64(y) if y < 126 else 0.0
        assert abs(weight - exact) <= 2e-7 * exact
    for score in (np.nan, -np.inf):
        assert weighed(np.float32(score), np.float32(0), np.float32(1))[0] == 0
    assert weighed(np.float32(1), np.float32(0), np.float32(1)) == (1, 0)


@pytest.mark.parametrize("count", [0, 1, 37])
def test_tiles_of_products(count: int) -> None:
    @njit
    def run(a, b, c):
        at = np.uint64
        products(a, at(3), at(50), b, at(5), at(count), c, at(7), at(WIDE + 2))  # pyright: ignore[reportCallIssue]

    generator = np.random.default_rng(count)
    a = generator.normal(size=3 + ROWS * 50).astype(np.float32)
    b = generator.normal(size=5 + 50 * WIDE).astype(np.float32)
    c = np.full(7 + ROWS * (WIDE + 2), 9, np.float32)
    run(a, b, c)
    exact = a[3:].reshape(ROWS, 50)[:, :count] @ b[5:].reshape(50, WIDE)[:count].astype(np.float64)
    found = c[7:].reshape(ROWS, WIDE + 2)
    np.testing.assert_allclose(found[:, :WIDE], exact, atol=1e-5)
    assert (found[:, WIDE:] == 9).all()
    assert (c[:7] == 9).all()


@settings(deadline=None, max_examples=25)
@given(
    queries=st.integers(1, 70), keys=st.integers(1, 70), batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2)]), width=st.sampled_from([1, 3, 8, 33]),
    of_values=st.sampled_from([1, 5, 16, 40]), left=st.none() | st.integers(0, 40),
    right=st.none() | st.integers(-2, 40), offset=st.integers(0, 40), size=st.sampled_from([0.1, 1.0, 300.0]),
    cut=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)  # fmt: skip
def test_any_shape_gives_what_the_reference_gives(
    queries, keys, batch, heads, width, of_values, left, right, offset, size, cut
) -> None:
    positions = torch.arange(keys)
    valid = ((positions >= cut[0]) & (positions < keys - cut[1])).expand(batch, -1) if any(cut) else None
    mask = Mask(queries, keys, left, right, query_offset=offset, valid_keys=valid)
    q, k, _, rule = build(mask, batch=batch, heads=heads, width=width, size=size)
    v = torch.randn(batch, heads[1], keys, of_values, generator=torch.Generator().manual_seed(keys))
    z, lse = walks.walk(q, k, v, rule, (), {}, 0)
    exact = reference.attend(q, k, v, rule)
    # rounding of a score of some thousands is that of a weight
    close = 3e-5 * max(1, size)
    torch.testing.assert_close(z.double(), exact.z, atol=close, rtol=1e-4)
    torch.testing.assert_close(lse.double(), exact.lse, atol=close, rtol=1e-6)


def test_scores_that_rise_along_long_rows_and_scores_of_ten_thousand() -> None:
    length = 1700
    for size in (3.0, 1e4):
        ramp = torch.linspace(-size, size, length)
        q, k = torch.ones(1, 2, length, 1), torch.stack([ramp, ramp.flip(0)])[None, ..., None]
        v = torch.randn(1, 2, length, 4, generator=torch.Generator().manual_seed(0))
        rule = build(MASKS["causal"](length))[3]
        z, lse = walks.walk(q, k, v, rule, (), {}, 0)
        exact = reference.attend(q, k, v, rule)
        torch.testing.assert_close(lse.double(), exact.lse, atol=1e-5 * size, rtol=1e-6)
        torch.testing.assert_close(z.double(), exact.z, atol=1e-5 * max(size / 30, 1), rtol=1e-4)


def test_half_precision_and_views_are_read_as_they_are() -> None:
    q, k, v, rule = build(MASKS["causal"](600), dtype=torch.bfloat16)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    z, lse = walks.walk(views[0], views[1], views[2], rule, (), {}, 0)
    exact = reference.attend(q, k, v, rule)
    torch.testing.assert_close(z.double(), exact.z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lse.double(), exact.lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["causal", "window", "nothing seen"])
def test_parts_are_all_rows_of_all_heads_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walks, "PART", 2**10)
    seen = walks.ends(MASKS[kind](300))
    assert seen is not None
    low, high = seen
    found = torch.zeros(2, 3, 300)
    for part in walks.parts((2, 6, 300, 300), 3, 2 * (high - low).clamp_min(0)[0]):
        found[part.batch, part.key_heads, part.rows] += 1
    assert (found == 1).all()


def test_it_is_said_what_computes() -> None:
    assert walks.computed_by().startswith("numba ")
