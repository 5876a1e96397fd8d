"""Edits through the fused kernel against the dense float64 reference: outputs, lse, factors, maps and products.

What such edits need is tested here with them: classes of keys (`key_classes.py`), a few keys one by one
(`few_keys.py`), attention without these (`left_out.py`) and score edits as factors and biases (`score_edits.py`).

Mutations seen to fail here: the few keys counted in a large class too, sinks left out of the joint log-sum-exp, a
temperature left off the biases before it, hidden rows at lse 0, the own position one column off, rows of a second call
chosen the wrong way round, per-key bias left out of the transpose, the rows of keys that were taken out seeing the keys
behind them, some rows at the place of the first. Found here: features that are
not neighbours in memory.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from attention_cases import cases, wanted
from comparison import close
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from limits import most_calls

from headwater.kernels.attend import attend
from headwater.kernels.backends import blocked, flash, fused_kernel, left_out, score_edits
from headwater.kernels.backends.choose import choose_for
from headwater.kernels.backends.flash import Flash
from headwater.kernels.edits.scores import BiasKeys, BlockScores, ScaleScores
from headwater.kernels.edits.weights import MixIdentity, Rescale, RowCondition
from headwater.kernels.maps import statistics
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

PROFILE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def _every_case_runs():
    with most_calls(99):
        yield


@st.composite
def edited(draw):
    """A plain problem with edits of every kind the fused kernel takes, on random heads, keys and queries."""
    case = draw(cases(plain=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, heads, queries = case.q.shape[:3]
    keys = case.k.shape[2]

    def some(share, *shape):
        return torch.rand(*shape, generator=generator) < share

    def chosen():
        return some(0.6, heads) if draw(st.booleans()) else some(0.6, batch, heads)

    first = torch.zeros(1, keys, dtype=torch.bool)
    first[:, : draw(st.sampled_from([1, 4]))] = True
    sets = [first.expand(batch, -1), some(0.4, batch, keys), some(0.1, 1, keys)]
    scores, weights = [], []
    for kind in draw(st.lists(st.sampled_from(["scale", "bias", "block keys", "block"]), max_size=3)):
        if kind == "scale" and (case.rule.bias is None or case.rule.bias.shape[2] == 1):
            scores.append(ScaleScores(chosen(), draw(st.sampled_from([0.0, 0.5, 2.0]))))
        if kind == "bias":
            bias = torch.randn(batch, heads, keys, generator=generator)
            scores.append(BiasKeys(chosen(), bias if draw(st.booleans()) else bias[:, 0]))
        if kind == "block keys":
            scores.append(
                BlockScores(chosen(), torch.ones(1, queries, dtype=torch.bool), draw(st.sampled_from(sets)))
            )
        if kind == "block":
            scores.append(BlockScores(chosen(), some(0.5, batch, queries), draw(st.sampled_from(sets))))
    for kind in draw(st.lists(st.sampled_from(["rescale", "condition", "identity"]), max_size=3)):
        rows = some(0.7, batch, 1, queries) if draw(st.booleans()) else None
        keep, picked = draw(st.sampled_from([0.0, 0.4, 3.0])), draw(st.sampled_from(sets))
        if kind == "identity":
            weights.append(MixIdentity(chosen(), 0.3, rows))
            continue
        to = ~picked if draw(st.booleans()) else some(0.5, batch, keys) & ~picked
        condition = RowCondition(picked, picked | to, 0.5, 0.1) if kind == "condition" else None
        weights.append(Rescale(chosen(), picked, to, keep if keep <= 1 else 0.9, rows, condition))
    size = 1.0 if weights else 4.0
    q = torch.randn(case.q.shape, generator=generator) * size
    reason = Flash().why_not(q, case.k, replace(case.rule, edits=tuple(scores)), weights)
    assume(reason != "edits of more than 16 classes of keys")
    return replace(case, q=q, rule=replace(case.rule, edits=tuple(scores)), edits=tuple(weights))


@PROFILE
@given(edited(), st.sampled_from([1, 64]), st.sampled_from([1, 16]))
def test_outputs_factors_and_maps_agree_with_the_reference(case, least, few_rows):
    assert Flash().why_not(case.q, case.k, case.rule, case.edits) is None
    with mock.patch.object(left_out, "LEAST", least), mock.patch.object(flash, "FEW_ROWS", few_rows):
        z, map = attend(case.q, case.k, case.v, case.rule, case.edits, "flash")
    dense = reference.attend(case.q, case.k, case.v, case.rule, case.edits)
    close(z, dense.z, 5, "z")
    silent = torch.isinf(map.lse)
    close(map.lse[~silent], dense.lse[~silent], 10, "lse")
    close(map.dense(), wanted(case).weights, 1, "map")
    _, _, steps, _ = blocked.attend(case.q, case.k, case.v, case.rule, case.edits)
    for mine, theirs in zip(map.steps, steps, strict=True):
        assert mine.edit is theirs.edit
        for a, b in zip(mine.factors, theirs.factors, strict=True):
            live = ~silent.expand_as(a)
            torch.testing.assert_close(a[live], b[live], atol=3e-5, rtol=1e-3)


LENGTH = 90
HEADS = torch.tensor([True, False, True, True])


def _few(*keys: int) -> torch.Tensor:
    return torch.isin(torch.arange(LENGTH), torch.tensor(keys))[None]


def _lengthy(right: int | None = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ScoreRule]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, LENGTH, 8) * 3, torch.randn(2, 2, LENGTH, 8), torch.randn(2, 2, LENGTH, 5)
    sinks = torch.tensor([0.5, -1.0, 4.0, 0.0])
    return q, k, v, ScoreRule(0.4, Mask(LENGTH, LENGTH, right=right), sinks=sinks)


def _held(q, k, v, rule, edits) -> None:
    z, map = attend(q, k, v, rule, edits, "flash")
    dense = reference.attend(q, k, v, rule, edits)
    close(z, dense.z, 5, "z")
    silent = torch.isinf(map.lse)
    close(map.lse[~silent], dense.lse[~silent], 10, "lse")
    close(map.dense(), dense.weights, 1, "map")


@pytest.mark.parametrize("right", [0, None])
@pytest.mark.parametrize("keys", [(0, 1, 2), (0, 1, 40, LENGTH - 1), (7, 8, 50), (LENGTH - 1,)])
@pytest.mark.parametrize("kind", ["rescale", "knockout", "knockout of rows", "bias", "all"])
def test_a_few_keys_are_edited_without_a_mask_of_keys(kind, keys, right, monkeypatch) -> None:
    q, k, v, rule = _lengthy(right)
    chosen, every = _few(*keys), torch.ones(1, LENGTH, dtype=torch.bool)
    rows = torch.arange(LENGTH) % torch.tensor([[2], [3]]) == 0
    edits = (Rescale(HEADS, chosen, ~chosen, 0.4),) if kind in ("rescale", "all") else ()
    scores = {
        "knockout": [BlockScores(HEADS, every, chosen)],
        "knockout of rows": [BlockScores(HEADS, rows, chosen)],
        "bias": [BiasKeys(HEADS, chosen * 1.5)],
        "all": [BiasKeys(~HEADS, chosen * -2.0), ScaleScores(HEADS, 0.7), BlockScores(HEADS, rows, _few(keys[0]))],
    }.get(kind, [])  # fmt: skip
    masks = []
    monkeypatch.setattr(fused_kernel, "call", _noting(fused_kernel.call, masks))
    _held(q, k, v, replace(rule, edits=tuple(scores)), edits)
    # the rows that went with the few keys have a mask of their own
    assert [mask is None or mask.shape[2] == len(keys) for mask in masks] == [True] * len(masks)
    assert masks[0] is None


@pytest.mark.parametrize("most", [1e-3, 1.5, 60.0])
@pytest.mark.parametrize(
    "shape", ["causal", "full", "cache", "one query", "padding", "row bias", "large scores"]
)
def test_a_bias_that_raises_a_few_keys_is_put_on_afterwards(
    shape, most, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call of the kernel without a mask of keys. Seen to fail with the bias of one head for all."""
    q, k, v, rule = _lengthy()
    mask, more = rule.mask, {}
    if shape == "full":
        mask = Mask(LENGTH, LENGTH)
    elif shape in ("cache", "one query"):
        count = 40 if shape == "cache" else 1
        q, mask = q[:, :, :count], Mask(count, LENGTH, right=0, query_offset=LENGTH - count)
    elif shape == "padding":
        real = torch.arange(LENGTH) >= torch.tensor([[0], [30]])
        mask = Mask(LENGTH, LENGTH, right=0, valid_keys=real, valid_queries=real)
    elif shape == "row bias":
        more = {"bias": torch.randn(1, 4, q.shape[2], LENGTH)}
    elif shape == "large scores":
        q = q * 8
    keys = (0, 1, 40, LENGTH - 1)
    bias = torch.where(_few(*keys), torch.linspace(-0.69, most, LENGTH), 0.0)
    edits = (BiasKeys(HEADS, bias), BiasKeys(~HEADS, torch.where(_few(3), 0.5, 0.0)))
    masks = []
    monkeypatch.setattr(fused_kernel, "call", _noting(fused_kernel.call, masks))
    _held(q, k, v, replace(rule, mask=mask, edits=edits, **more), ())
    assert len(masks) == (2 if shape == "cache" else 1)


@pytest.mark.parametrize("bias", [-0.8, -torch.inf, 61.0])
def test_other_biases_of_a_few_keys_go_their_own_way(bias) -> None:
    edits = [BiasKeys(HEADS, torch.where(_few(2), bias, 0.0))]
    assert score_edits.raised(edits, torch.zeros(1)) is None
    q, k, v, rule = _lengthy()
    _held(q, k, v, replace(rule, edits=tuple(edits)), ())


def test_every_key_may_be_one_of_a_few() -> None:
    q, k, v, rule = _lengthy()
    q, k, v = (x[:, :, :12] for x in (q, k, v))
    every = torch.ones(1, 12, dtype=torch.bool)
    rule = ScoreRule(0.4, Mask(12, 12, right=0), edits=(BlockScores(HEADS, every, every),))
    with mock.patch.object(left_out, "LEAST", 1):
        _held(q, k, v, rule, ())


@pytest.mark.parametrize("rows", [(LENGTH - 1,), (0,), (3, 4, 60)])
def test_a_few_rows_take_a_call_of_their_own(rows, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, rule = _lengthy()
    edit = BlockScores(HEADS, _few(*rows), _few(*range(0, LENGTH, 2)))
    calls = []

    def counted(q, *given):
        calls.append(q.shape[2])
        return plain(q, *given)

    plain = fused_kernel.call
    monkeypatch.setattr(fused_kernel, "call", counted)
    _held(q, k, v, replace(rule, edits=(edit,)), ())
    assert calls[0] == LENGTH
    assert max(calls[1:]) <= 2
    unedited, _ = attend(q, k, v, rule)
    z, _ = attend(q, k, v, replace(rule, edits=(edit,)), (), "flash")
    others = ~_few(*rows)[0]
    assert torch.equal(z[:, :, others], unedited[:, :, others])


def _noting(call, masks: list[object]):
    def noted(q, k, v, causal, bias, scale):
        masks.append(bias)
        return call(q, k, v, causal, bias, scale)

    return noted


@PROFILE
@given(edited(), st.sampled_from([1, 3, 20]), st.booleans())
def test_products_of_edited_maps_agree_with_the_reference(case, columns, per_head):
    _, map = attend(case.q, case.k, case.v, case.rule, case.edits, "flash")
    dense = wanted(case).weights
    batch, heads, queries, keys = map.shape
    x = torch.randn(batch, heads, keys, columns) if per_head else torch.randn(keys, columns)
    y = torch.randn(batch, heads, queries, columns)
    assert choose_for(map).name == "flash"
    close(map @ x, dense @ x.double(), 5, "P @ x")
    if choose_for(map, transposed=True).name == "flash":
        close(map.T @ y, dense.mT @ y.double(), 30, "P^T @ y")


@pytest.mark.parametrize("kind", ["knockout", "rescale"])
@pytest.mark.parametrize("far", [16, 200])
def test_a_row_that_looks_at_its_sink_alone_loses_no_digits(far, kind):
    """All but 1e-9 of the mass lies on one key, which is emptied: what is left must be right to float32."""
    torch.manual_seed(0)
    keys = 300
    q, k, v = torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 8)
    q[..., 0], k[..., 0], k[:, :, 0, 0] = 6.0, 0.0, 8.0
    sink = (torch.arange(keys) < 1)[None]
    if far == 200:  # a large set too: a second call instead of columns
        sink = sink | ((torch.arange(keys) >= 40) & (torch.arange(keys) < 140))[None]
        k[:, :, 40:140, 0] = -4.0
    heads, every = torch.tensor([True, False]), torch.ones(1, keys, dtype=torch.bool)
    scores = (BlockScores(heads, every, sink),) if kind == "knockout" else ()
    rule = ScoreRule(0.5, Mask(keys, keys, right=0), edits=scores)
    edits = () if scores else (Rescale(heads, sink, ~sink, 0.0),)
    z, map = attend(q, k, v, rule, edits, "flash")
    exact = reference.attend(q, k, v, rule, edits)
    plain = reference.attend(q, k, v, replace(rule, edits=()))
    assert plain.weights[0, 0, 1:, 0].min() > 1 - 1e-6
    torch.testing.assert_close(z.double(), exact.z, atol=1e-5, rtol=1e-4)
    gathered = map @ v
    torch.testing.assert_close(gathered.double(), exact.z, atol=1e-5, rtol=1e-4)


def test_statistics_of_edited_maps_are_those_of_the_reference():
    torch.manual_seed(2)
    q, k, v = torch.randn(2, 4, 70, 8), torch.randn(2, 2, 70, 8), torch.randn(2, 2, 70, 8)
    real = torch.arange(70) >= torch.tensor([[0], [30]])
    rule = ScoreRule(0.5, Mask(70, 70, right=0, valid_keys=real, valid_queries=real))
    sink = torch.arange(70) == torch.tensor([[0], [30]])
    edits = (Rescale(torch.tensor([True, True, False, True]), sink, ~sink, 0.2),)
    _, map = attend(q, k, v, rule, edits, "flash")
    dense = reference.attend(q, k, v, rule, edits)
    dense = dense._replace(weights=dense.weights * real[:, None, :, None])
    expected = reference.statistics(dense, rule)
    found = statistics.compute(map, ("entropy", "received", "first", "max"))
    for name, values in found.items():
        close(values, expected[name], 10, name)


@pytest.mark.parametrize("kind", ["bias", "full bias"])
def test_rows_that_lose_every_key_have_no_weights(kind):
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    hide = torch.zeros(1, 2, 1, 12)
    hide[..., :5] = float("-inf")
    if kind == "full bias":
        hide = hide.expand(1, 2, 12, 12)
    rule = ScoreRule(0.5, Mask(12, 12, right=0), bias=hide)
    z, map = attend(q, k, v, rule, (), "flash")
    dense = reference.attend(q, k, v, rule)
    assert torch.isinf(map.lse)[..., :5].all()
    close(z, dense.z)
    close(map.dense(), dense.weights)


@pytest.mark.parametrize("across", "qkvxy")
def test_features_need_not_be_neighbours_in_memory(across):
    """The fused kernel does not look at that stride, and reads other numbers where it is not 1."""
    torch.manual_seed(5)
    widths = {"q": 8, "k": 8, "v": 8, "x": 8, "y": 9}
    given = {name: torch.randn(2, 3, 21, width) for name, width in widths.items()}
    given[across] = torch.randn(2, 3, widths[across], 21).mT
    q, k, v, x, y = given.values()
    rule = ScoreRule(0.5, Mask(21, 21, right=0))
    z, map = attend(q, k, v, rule, (), "flash")
    dense = reference.attend(q, k, v, rule)
    close(z, dense.z, 5, "z")
    close(map @ x, dense.weights @ x.double(), 5, "P @ x")
    close(map.T @ y, dense.weights.mT @ y.double(), 30, "P^T @ y")


def test_a_narrow_head_with_many_classes_of_keys_is_received_rightly():
    """Five classes are as many columns as the transpose of a head four wide takes at once, and they lie across."""
    torch.manual_seed(6)
    q, k, v = (torch.randn(1, 2, 17, 4) for _ in range(3))
    place = torch.arange(17)[None]
    condition = RowCondition(place % 5 == 1, place % 7 != 3, 0.9, 0.0)
    edit = Rescale(torch.tensor([True, False]), place % 2 == 0, place % 2 == 1, 0.3, None, condition)
    rule = ScoreRule(0.5, Mask(17, 17, right=0))
    _, map = attend(q, k, v, rule, (edit,), "flash")
    close(map.received(), reference.attend(q, k, v, rule, (edit,)).weights.sum(-2), 30, "received")


@pytest.mark.parametrize("queries", [2, 9, 30])
@pytest.mark.parametrize("edits", ["none", "sink"])
def test_queries_that_start_inside_the_cache_see_all_of_it(queries, edits):
    """Chunked prefill: the cache and the causal rest are joined by their log-sum-exps."""
    torch.manual_seed(4)
    keys, heads = 33, torch.tensor([True, False, True, True])
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 5)
    real = torch.arange(keys) >= torch.tensor([[0], [keys - queries + 1]])
    mask = Mask(queries, keys, right=0, query_offset=keys - queries, valid_keys=real)
    rule = ScoreRule(0.5, mask, sinks=torch.randn(4), bias=torch.randn(1, 4, 1, keys))
    weight = ()
    if edits == "sink":
        first = (torch.arange(keys) < 3)[None]
        weight = (Rescale(heads, first, ~first, 0.2), MixIdentity(heads, 0.3))
    z, map = attend(q, k, v, rule, weight, "flash")
    dense = reference.attend(q, k, v, rule, weight)
    close(z, dense.z, 5, "z")
    close(map.dense(), dense.weights, 1, "map")
    x, y = torch.randn(keys, 3), torch.randn(2, 4, queries, 3)
    close(map @ x, dense.weights @ x.double(), 5, "P @ x")
    bare = replace(rule, bias=None)
    _, map = attend(q, k, v, bare, weight, "flash")
    assert choose_for(map, transposed=True).name == "flash"
    close(map.T @ y, reference.attend(q, k, v, bare, weight).weights.mT @ y.double(), 30, "P^T @ y")
