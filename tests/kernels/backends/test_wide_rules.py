"""Every normaliser, edit and pattern, documents and ALiBi: blocks of rows against the dense reference, several at once.

In float64, where only a wrong formula shows; in float32 within what rounding of the inputs does to the reference; in
16 bits within what rounding of the output adds. Mutations seen to fail here: a pattern that is not normalised, edits
on rows without weights, given weights read without the cache's offset, padding rows that keep a pattern, a sink that is
not put through f, elu without its 1, heads of batch row 0 for all, chosen pairs without slopes or with what an edit
leaves on a row of padding.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, cases, wanted
from comparison import near
from hypothesis import given, settings, strategies as st
from limits import block_elements
from wide_cases import NORMALISERS, of_rows

from headwater.kernels.attend import attend
from headwater.kernels.edits.weights import MixIdentity, Rescale
from headwater.kernels.maps import statistics
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask

pytestmark = pytest.mark.usefixtures("poison")
PROFILE = settings(max_examples=60, deadline=None)
WIDE = cases(wide=True)


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    return replace(case, q=case.q.to(dtype), k=case.k.to(dtype), v=case.v.to(dtype))


def run(case: Case, elements: int = 2**19) -> tuple[torch.Tensor, AttentionMap]:
    with block_elements(elements):
        z, map = attend(case.q, case.k, case.v, case.rule, case.edits, "blocked")
        return z, replace(map, backend="blocked")


def names_for(map: AttentionMap) -> tuple[str, ...]:
    return tuple(name for name in statistics.NAMES if not (name == "entropy" and map.signed))


@PROFILE
@given(WIDE, st.sampled_from([1, 40, 2**19]))
def test_output_map_and_statistics_in_float64(case, elements):
    case = in_dtype(case, torch.float64)
    z, map = run(case, elements)
    dense = wanted(case)
    assert z.dtype == torch.float64
    near(z, reference.attend(case.q, case.k, case.v, case.rule, case.edits).z, 1e-8, "z")
    everything = Block(
        slice(0, map.shape[0]), torch.arange(map.shape[1]), *(slice(0, n) for n in map.shape[2:])
    )
    near(map.block(everything), dense.weights, 1e-9, "map")
    silent = torch.isinf(map.lse)
    near(map.lse[~silent], dense.lse[~silent], 1e-9, "lse")
    expected = reference.statistics(dense, case.rule, case.groups)
    found = map.statistics(names_for(map), case.groups)
    for name in found.keys() - {"argmax"}:
        near(found[name], expected[name], 1e-4, name)
    places = found["argmax"]
    assert ((places >= 0) == (expected["argmax"] >= 0)).all()
    top = dense.weights.gather(-1, places.clamp_min(0)[..., None])[..., 0]
    near(top[places >= 0], expected["max"][places >= 0], 1e-9, "argmax")


@PROFILE
@given(WIDE, st.integers(0, 2**31))
def test_float32_is_as_near_as_its_inputs_allow(case, seed):
    """The error allowed is what inputs moved by a few roundings do to the reference itself."""
    generator = torch.Generator().manual_seed(seed)
    z, _ = run(case)
    exact = reference.attend(case.q, case.k, case.v, case.rule, case.edits).z
    slack = torch.zeros(())
    for _ in range(3):
        q, k, v = (
            x.double() * (1 + 3e-7 * torch.randn(x.shape, generator=generator).double())
            for x in (case.q, case.k, case.v)
        )
        moved = reference.attend(q, k, v, case.rule, case.edits).z
        slack = torch.maximum(slack, (moved - exact).abs().max() if exact.numel() else slack)
    near(z, exact, float(10 * slack) + 1e-5, "z")


@settings(max_examples=25, deadline=None)
@given(WIDE, st.sampled_from([torch.bfloat16, torch.float16]))
def test_sixteen_bits_are_computed_in_thirty_two(case, dtype):
    """The same rounded inputs in float32: only the rounding of the output may be between them."""
    case = in_dtype(case, dtype)
    z, map = run(case)
    z32, map32 = run(in_dtype(case, torch.float32))
    assert z.dtype == dtype
    torch.testing.assert_close(z, z32.to(dtype), atol=1e-6, rtol=2 * torch.finfo(dtype).eps)
    near(map.dense(), map32.dense(), 1e-6, "map")


@PROFILE
@given(WIDE, st.sampled_from([1, 3]), st.booleans())
def test_products_are_those_of_the_dense_map(case, columns, per_head):
    case = in_dtype(case, torch.float64)
    _, map = run(case)
    weights = wanted(case).weights
    batch, heads, queries, keys = map.shape
    x = torch.randn(batch, heads, keys, columns) if per_head else torch.randn(keys, columns)
    y = torch.randn(batch, heads, queries, columns) if per_head else torch.randn(batch, queries, columns)
    near(map @ x, weights @ x.double(), 1e-8, "P @ x")
    near(map.T @ y, weights.mT @ (y if per_head else y[:, None]).double(), 1e-7, "P^T @ y")


@pytest.mark.parametrize(
    "kind", NORMALISERS, ids=lambda kind: f"{kind.name}-{kind.features}-{kind.normalise}"
)
@pytest.mark.parametrize("what", ["slopes", "documents"])
def test_chosen_pairs_come_pair_by_pair_under_every_rule(kind, what):
    generator = torch.Generator().manual_seed(7)
    q, k = (torch.randn(2, 4, 9, 5, generator=generator).double() for _ in range(2))
    real = torch.arange(9) >= torch.tensor([[0], [3]])
    mask = Mask(9, 9, right=None if kind.name == "sinkhorn" else 0, valid_keys=real, valid_queries=real)
    if what == "documents":
        mask = replace(mask, documents=(torch.arange(9) >= 5).long()[None])
    alibi = torch.tensor([0.5, 1.0, 0.0, 0.2]) if what == "slopes" else None
    first = (torch.arange(9) < 5)[None]
    edits = (Rescale(torch.tensor([True, False, True, True]), first, ~first, 0.3),)
    rule = ScoreRule(0.8, mask, alibi=alibi, normaliser=kind)
    _, map = attend(q, k, k, rule, edits, "blocked")
    columns = torch.randint(-2, 11, (2, 4, 9, 3), generator=generator)
    near(map.at(columns), reference.at(wanted(Case(q, k, k, rule, edits, first)), rule, columns), 1e-6, "at")


def test_a_row_of_padding_keeps_nothing_on_its_own_position():
    """In cross-attention the key at the place of a padded query may be real: the identity would leave 1 there."""
    q, k = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 5, 4)
    mask = Mask(3, 5, valid_queries=torch.tensor([[True, False, True], [True, True, True]]))
    _, map = attend(q, k, k, ScoreRule(0.5, mask), (MixIdentity(torch.tensor([True]), 1.0),))
    assert map.stripe(0).tolist() == [[[1, 0, 1]], [[1, 1, 1]]]


@PROFILE
@given(WIDE, st.integers(0, 2**31))
def test_a_permutation_of_the_batch_permutes_the_result(case, seed):
    """Every tensor of rule, edits and patterns that has a batch axis goes with its batch row."""
    case = in_dtype(case, torch.float64)
    order = torch.randperm(len(case.q), generator=torch.Generator().manual_seed(seed))
    z, map = run(case)
    permuted, other = run(of_rows(case, order))
    near(permuted, z[order], 1e-12, "z")
    near(other.dense(), map.dense()[order], 1e-7, "map")
    alone, _ = run(of_rows(case, order[:1]))
    near(alone, z[order[:1]], 1e-12, "alone")


@settings(max_examples=30, deadline=None)
@given(WIDE)
def test_shares_measure_sizes_of_rows_that_sum_to_anything(case):
    case = in_dtype(case, torch.float64)
    _, map = run(case)
    dense = wanted(case)
    size = dense.weights.abs()
    shares = dense._replace(weights=size / (size.sum(-1, keepdim=True) + 1e-8))
    expected = reference.statistics(shares, case.rule, case.groups)
    found = map.statistics(statistics.NAMES, case.groups, of="shares")
    for name in found.keys() - {"argmax"}:
        near(found[name], expected[name], 1e-4, name)


@settings(max_examples=25, deadline=None)
@given(WIDE, st.integers(0, 2**31))
def test_gradients_are_those_of_the_dense_formulas(case, seed):
    """Of q, k and v, in float64, through edits, Sinkhorn's iterations and row constants."""
    leaves = [x.double().requires_grad_() for x in (case.q, case.k, case.v)]
    z = attend(*leaves, case.rule, case.edits, "blocked")[0]
    weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).double()
    expected = torch.autograd.grad(
        (reference.attend(*leaves, case.rule, case.edits).z * weight).sum(), leaves
    )
    actual = torch.autograd.grad((z * weight).sum(), leaves)
    for found, wished, what in zip(actual, expected, "qkv", strict=True):
        near(found, wished, 1e-7, f"gradient of {what}")
