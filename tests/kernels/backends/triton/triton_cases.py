"""The Triton kernels against the dense float64 reference; `test_triton.py` runs this file in a process of its own.

On a machine with a GPU the kernels are compiled, elsewhere Triton's interpreter runs them. Outputs are allocated full
of NaN, so that an element that no program writes is seen. Mutations seen to fail here: see `test_triton.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Case, cases, rich
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from triton_checks import DEVICE, agree, close, expected, on_device, real_rows

from headwater.kernels.attend import attend
from headwater.kernels.backends import blocked
from headwater.kernels.backends.triton import backend
from headwater.kernels.backends.triton.backend import Triton
from headwater.kernels.backends.triton.tile_sizes import Config
from headwater.kernels.edits.scores import BlockScores
from headwater.kernels.edits.weights import MixIdentity, Rescale
from headwater.kernels.maps import statistics
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

pytestmark = pytest.mark.usefixtures("poison")

TILES = [None, Config(32, 16, 4, 2), Config(16, 64, 4, 2)]
FEW = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize(
    ("kind", "tiles"),
    [
        ("causal", (16, 16)),
        ("padded", (16, 16)),
        ("window", (16, 16)),
        ("window", (32, 16)),
        ("cache", (16, 32)),
        ("cross", (16, 16)),
    ],
    ids=str,
)
def test_many_tiles_give_what_the_reference_gives(kind, tiles):
    """Each mode of each kernel over interiors and rims: from scratch, from the saved lse, and key-major."""
    tiles = Config(*tiles, 4, 2)
    case = rich(kind, DEVICE)
    q, k, rule = case.q, case.k, case.rule
    result = Triton(tiles).attend(q, k, case.v, rule, case.edits, backend.ROW, case.groups)
    dense = expected(case)
    close(result.z, dense.z, "z")
    close(result.lse, dense.lse, "lse")
    agree(result.found, dense, case)
    lse = AttentionMap.of(q, k, rule, result.lse).lse
    again = Triton(tiles).statistics(
        MapState(q, k, rule, lse, result.steps), ("entropy", "argmax", "received")
    )
    agree(again, dense, case)


@pytest.mark.parametrize("kind", ["padded", "window"])
def test_edits_of_a_few_keys_take_one_pass(kind, monkeypatch):
    """The keys set aside hold nearly all mass in one head: nothing may be lost by taking them out."""
    case = rich(kind, DEVICE)
    few = (torch.arange(40) >= 10)[None] & (torch.arange(40) < 14)
    case.k[:, :, 11] *= 30
    edits = (
        Rescale(torch.tensor([True, False]), few, ~few, 0.4),
        MixIdentity(torch.tensor([False, True]), 0.25),
        Rescale(torch.tensor([True, True]), few.roll(2, -1) & few, few & ~few.roll(2, -1), 0.5),
    )
    case = replace(case, edits=edits)
    launches = []
    launch = backend.rows_pass
    monkeypatch.setattr(backend, "rows_pass", lambda *a, **kw: launches.append(a) or launch(*a, **kw))
    result = Triton(Config(32, 16, 4, 2)).attend(case.q, case.k, case.v, case.rule, edits)
    assert len(launches) == 1
    dense = expected(case)
    close(result.z, dense.z, "z")
    measured = Triton(Config(32, 16, 4, 2)).attend(
        case.q, case.k, case.v, case.rule, edits, ("entropy", "self")
    )
    assert torch.equal(measured.z, result.z), "measuring changes the output"
    agree(measured.found, dense, case)
    steps = blocked.attend(case.q, case.k, case.v, case.rule, edits)[2]
    for found, wanted in zip(result.steps, steps, strict=True):
        for actual, factor in zip(found.factors, wanted.factors, strict=True):
            torch.testing.assert_close(actual, factor.float(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("mask", [Mask(70, 70), Mask(70, 70, right=0), Mask(70, 70, left=20, right=2)])
def test_the_first_keys_are_walked_past(mask):
    """Sinks of two kinds: keys 0 and 3, whose mass goes to the others, and learned ones in the denominator."""
    torch.manual_seed(6)
    q, k, v = (torch.randn(1, heads, 70, 8, device=DEVICE) * 2 for heads in (2, 1, 1))
    rule = ScoreRule(0.4, mask, sinks=torch.tensor([0.5, 3.0]))
    keys = ((torch.arange(70) == 0) | (torch.arange(70) == 3))[None]
    edits = (
        Rescale(torch.tensor([True, True]), keys, ~keys, 0.3),
        MixIdentity(torch.tensor([True, False]), 0.2),
    )
    case = Case(q, k, v, rule, edits, torch.zeros(1, k.shape[2], dtype=torch.bool))
    dense = expected(case)
    result = Triton(Config(16, 16, 4, 1)).attend(q, k, v, rule, edits, ("entropy", "row_mass"))
    close(result.z, dense.z, "z")
    close(result.lse, dense.lse, "lse")
    agree(result.found, dense, case)


def test_what_a_sink_leaves_keeps_its_digits_in_half_precision():
    """Key 0 holds all but 8e-6 of the mass and is emptied: the others are weighed beside each other, not beside it."""
    torch.manual_seed(6)
    v = torch.rand(1, 1, 512, 4, device=DEVICE).half()
    q, k = torch.ones(1, 1, 1, 1, device=DEVICE).half(), torch.zeros(1, 1, 512, 1, device=DEVICE).half()
    k[:, :, 0] = 18
    sink = (torch.arange(512) == 0)[None]
    edits = (Rescale(torch.tensor([True]), sink, ~sink, 0.0),)
    z = Triton().attend(q, k, v, ScoreRule(1.0, Mask(1, 512)), edits).z
    torch.testing.assert_close(z[0, 0, 0].float(), v[0, 0, 1:].float().mean(0), atol=2e-3, rtol=0)


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_scales_of_zero_and_below(scale):
    torch.manual_seed(6)
    q, k, v = (torch.randn(1, 2, 40, 8, device=DEVICE) for _ in range(3))
    case = Case(
        q, k, v, ScoreRule(scale, Mask(40, 40, right=0)), (), torch.zeros(1, k.shape[2], dtype=torch.bool)
    )
    result = Triton(Config(16, 16, 4, 1)).attend(q, k, v, case.rule, (), ("entropy", "max"))
    dense = expected(case)
    close(result.z, dense.z, "z")
    agree(result.found, dense, case)


def taken(case: Case) -> bool:
    """Whether the kernels take the case: no mask given as a function, no sink that depends on the query."""
    return case.rule.mask.is_band and (case.rule.sinks is None or case.rule.sinks.dim() == 1)


@FEW
@given(cases(), st.sampled_from(TILES), st.sampled_from([torch.float32, torch.float32, torch.float16]))
def test_the_forward_pass_agrees_with_the_reference(case, tiles, dtype):
    """Output, lse and all row statistics of one pass, edits included, at several tile sizes."""
    assume(taken(case))
    case = on_device(case, dtype)
    result = Triton(tiles).attend(case.q, case.k, case.v, case.rule, case.edits, backend.ROW, case.groups)
    dense = expected(case)
    half = 1 if dtype == torch.float32 else 60  # weights and output are rounded to float16
    close(result.z, dense.z, "z", half)
    close(result.lse, dense.lse, "lse")
    agree(result.found, dense, case)


@FEW
@given(cases(), st.sampled_from(TILES), st.sampled_from([1, 3, 20]), st.booleans())
def test_the_map_agrees_with_the_reference(case, tiles, columns, per_head):
    """From the saved lse: row statistics, received, `P @ x` and `P^T @ y`, of plain and edited weights."""
    assume(taken(case))
    case = on_device(case, torch.float32)
    q, k, rule = case.q, case.k, case.rule
    _, lse, steps, _ = blocked.attend(q, k, case.v, rule, case.edits)
    lse = AttentionMap.of(q, k, rule, lse).lse
    dense = expected(case)
    agree(
        Triton(tiles).statistics(MapState(q, k, rule, lse, steps), (*backend.ROW, "received"), case.groups),
        dense,
        case,
    )
    batch, heads, queries = q.shape[:3]
    shape = (batch, heads if per_head else 1)
    x, y = (torch.randn(*shape, length, columns, device=DEVICE) for length in (k.shape[2], queries))
    weights = real_rows(case, dense.weights)
    close(Triton(tiles).gather(MapState(q, k, rule, lse, steps), x), weights @ x.double().cpu(), "gather")
    close(
        Triton(tiles).scatter(MapState(q, k, rule, lse, steps), y), weights.mT @ y.double().cpu(), "scatter"
    )


@FEW
@given(cases(), st.data())
def test_received_over_a_range_or_a_window_of_later_queries(case, data):
    assume(taken(case))
    case = on_device(case, torch.float32)
    _, lse, steps, _ = blocked.attend(case.q, case.k, case.v, case.rule, case.edits)
    lse = AttentionMap.of(case.q, case.k, case.rule, lse).lse
    weights = real_rows(case, expected(case).weights)
    queries, keys = weights.shape[-2:]
    first = data.draw(st.integers(0, queries - 1))
    last = data.draw(st.integers(first, queries))
    near = data.draw(st.integers(1, 5))
    far = near + data.draw(st.integers(0, 20))
    mask = case.rule.mask
    ahead = (torch.arange(queries) + mask.shift)[:, None] - torch.arange(keys)
    chosen = (ahead >= near) & (ahead <= far)
    state = MapState(case.q, case.k, case.rule, lse, steps)
    rows = torch.arange(queries)[None]
    spans = [(rows >= begin) & (rows < end) for begin, end in ((0, first), (first, last), (last, queries))]
    found = Triton(TILES[1]).received(state, spans[1], (near, far))
    close(found, (weights * chosen)[:, :, first:last].sum(-2), "received")
    # the parts of a partition of the rows add up to the whole
    parts = [Triton().received(state, span) for span in spans]
    close(sum(parts), weights.sum(-2), "received")


@FEW
@given(cases())
def test_three_routes_to_received_mass(case):
    """The key-major kernel, the map, and the transposed call of the fused CPU kernel (where it takes the case)."""
    assume(taken(case) and not case.edits)
    q, k = case.q.to(DEVICE), case.k.to(DEVICE)
    result = Triton().attend(q, k, case.v.to(DEVICE), case.rule)
    map = AttentionMap.of(q, k, case.rule, result.lse, backend="triton")
    dense = real_rows(case, reference.attend(case.q, case.k, case.v, case.rule).weights)
    by_kernel = map.statistic("received")
    close(by_kernel, dense.sum(-2), "received")
    ones = torch.ones(map.shape[2], 1)
    close((map.T @ ones)[..., 0], dense.sum(-2), "received")
    other = AttentionMap.of(case.q, case.k, case.rule, result.lse.cpu())
    close((other.T @ ones)[..., 0], by_kernel.double().cpu(), "received")


@FEW
@given(cases())
def test_laws_that_need_no_reference(case):
    """Mass is kept, entropy and maximum bound each other, edited rows keep their mass, K2 is deterministic."""
    assume(taken(case))
    case = on_device(case, torch.float32)
    rule = replace(case.rule, sinks=None)
    moved = tuple(edit for edit in case.edits if isinstance(edit, Rescale))
    result = Triton().attend(case.q, case.k, case.v, rule, moved, ("row_mass",))
    mass = result.found["row_mass"]
    close(mass[~mass.isnan()].cpu(), torch.ones(int((~mass.isnan()).sum())), "row_mass", 3)

    result = Triton().attend(case.q, case.k, case.v, rule, (), ("entropy", "max"))
    entropy, top = (result.found[name].cpu() for name in ("entropy", "max"))
    real = ~entropy.isnan()
    seen = rule.mask.visible_keys(len(case.q), 1).expand_as(entropy)[real]
    assert (entropy[real] >= 0).all()
    assert (entropy[real] <= seen.log() + 1e-4).all()
    assert (top[real] >= 1 / seen - 1e-5).all()
    assert ((-entropy[real]).exp() <= top[real] + 1e-4).all()
    lse = AttentionMap.of(case.q, case.k, rule, result.lse).lse
    received = Triton().received(MapState(case.q, case.k, rule, lse))
    close(received.sum(-1), real.sum(-1), "received", 10)
    assert torch.equal(received, Triton().received(MapState(case.q, case.k, rule, lse)))


@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_extreme_scores_stay_finite(size):
    """Equal, ordinary and one-hot rows; keys hidden on the left make whole tiles empty before the first score."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 70, 4, device=DEVICE) for _ in range(3))
    valid = (torch.arange(70) >= 40)[None]
    rule = ScoreRule(1.0, Mask(70, 70, right=0, valid_keys=valid, valid_queries=valid))
    result = Triton(Config(16, 16, 4, 1)).attend(q * size, k, v, rule, (), backend.ROW, valid)
    assert result.z.isfinite().all()
    assert (result.z[:, :, :40] == 0).all()
    assert (result.lse[:, :, :40] == -torch.inf).all()
    for name, values in result.found.items():
        assert values[..., 40:].isfinite().all(), name
        assert (values[..., :40] == -1).all() if name == "argmax" else values[..., :40].isnan().all(), name
    torch.testing.assert_close(
        result.found["mass"][..., 40:], torch.ones(1, 2, 1, 30, device=DEVICE), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("mask", [Mask(70, 70), Mask(70, 70, right=0), Mask(70, 70, left=10, right=3)])
def test_of_equal_weights_the_first_is_the_largest(mask):
    """The walk looks at pairs of neighbours, and a band may begin in the midst of one."""
    q, k = torch.zeros(1, 2, 70, 4, device=DEVICE), torch.randn(1, 1, 70, 4, device=DEVICE)
    rule = ScoreRule(1.0, mask)
    wanted = mask.first_visible(1, 2).expand(1, 2, -1)
    result = Triton(Config(16, 16, 4, 1)).attend(q, k, k, rule, (), ("argmax",))
    assert torch.equal(result.found["argmax"].cpu(), wanted)
    again = Triton(Config(16, 32, 4, 1)).statistics(MapState(q, k, rule, result.lse), ("argmax",))
    assert torch.equal(again["argmax"].cpu(), wanted)


def test_bfloat16_is_computed_from_its_values():
    """The interpreter would multiply its bit patterns."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 2, 33, 16, device=DEVICE).bfloat16() for _ in range(3))
    rule = ScoreRule(0.25, Mask(33, 33, right=0))
    result = Triton().attend(q, k, v, rule)
    assert result.z.dtype == torch.bfloat16
    dense = reference.attend(q.cpu().float(), k.cpu().float(), v.cpu().float(), rule)
    torch.testing.assert_close(result.z.double().cpu(), dense.z, atol=2e-2, rtol=2e-2)
    close(result.lse, dense.lse, "lse")


def test_mass_kept_on_the_own_position_is_not_received_later():
    case = rich("window", DEVICE)
    result = Triton().attend(case.q, case.k, case.v, case.rule, case.edits)
    ahead = torch.arange(40)[:, None] - torch.arange(40)
    for near, far in ((0, 3), (1, 3)):
        found = Triton().received(
            MapState(case.q, case.k, case.rule, result.lse, result.steps), later=(near, far)
        )
        close(found, (expected(case).weights * ((ahead >= near) & (ahead <= far))).sum(-2), "received")


def test_strided_operands_are_read_where_they_lie():
    """Models hand over views [batch, position, head, d] with the axes swapped."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 19, heads, 8, device=DEVICE).transpose(1, 2) for heads in (4, 2, 2))
    rule = ScoreRule(0.3, Mask(19, 19, left=5, right=0))
    case = Case(q, k, v, rule, (), torch.zeros(0))
    close(Triton().attend(q, k, v, rule).z, expected(case).z, "z")


def test_offsets_beyond_32_bits():
    """Keys 2^30 elements apart, as in a cache of a million tokens; only the pages that are touched take memory."""
    torch.manual_seed(4)
    step = 2**30
    try:
        storage = torch.UntypedStorage((2 * step + 16) * 2, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 4.3 GB of address space")
    far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage, 0, (1, 1, 3, 8), (0, 0, step, 1))
    near, q = (torch.randn(1, 1, 3, 8, device=DEVICE).half() for _ in range(2))
    far.copy_(near)
    rule = ScoreRule(0.3, Mask(3, 3, right=0))
    case = Case(q, far, far, rule, (), torch.zeros(0))
    result = Triton().attend(q, far, far, rule)
    close(result.z, expected(case).z, "z", 60)
    close(Triton().received(MapState(q, far, rule, result.lse)), expected(case).weights.sum(-2), "received")
    queries = Triton().attend(far, near, near, rule)
    close(
        Triton().received(MapState(far, near, rule, queries.lse)).sum(-1), torch.full((1, 1), 3.0), "received"
    )


def test_gradients_equal_the_dense_ones():
    """The backward pass repeats the forward pass in blocks under autograd; edits are part of what it repeats."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, h, 9, 4, device=DEVICE, requires_grad=True) for h in (4, 2, 2))
    rule = ScoreRule(0.5, Mask(9, 9, right=0), softcap=4.0)
    # every row sees a key of the target: where none is seen, the dense formula's gradient is 0/0
    keys = (torch.arange(9)[None] > 2) & (torch.arange(9)[None] < 5)
    edits = (Rescale(torch.tensor([True, True, False, True]), keys, ~keys, 0.4),)
    weight = torch.randn(2, 4, 9, 4, device=DEVICE)
    actual = torch.autograd.grad((attend(q, k, v, rule, edits, "triton")[0] * weight).sum(), (q, k, v))
    dense = reference.attend(*(x.cpu() for x in (q, k, v)), rule, edits).z
    wanted = torch.autograd.grad((dense * weight.cpu()).sum(), (q, k, v))
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), w.cpu(), atol=1e-5, rtol=1e-4)


@FEW
@given(cases())
def test_the_operator_under_the_name_triton(case):
    """`attend` and `AttentionMap` by name: products and statistics, with the conventions of the other backends."""
    assume(taken(case))
    case = on_device(case, torch.float32)
    z, map = attend(case.q, case.k, case.v, case.rule, case.edits, "triton")
    dense = expected(case)
    close(z, dense.z, "z")
    dense = dense._replace(weights=real_rows(case, dense.weights))
    agree(map.statistics(statistics.NAMES, case.groups), dense, case)
    x, y = torch.randn(map.shape[3], 2), torch.randn(map.shape[2], 2)
    close(map @ x, dense.weights @ x.double(), "gather")
    close(map.T @ y, dense.weights.mT @ y.double(), "scatter")


def test_what_it_can_not_do_it_refuses_by_name():
    q = torch.randn(1, 1, 9, 4, device=DEVICE)
    plain = ScoreRule(1.0, Mask(9, 9))
    odd = ScoreRule(1.0, Mask(9, 9, extra=lambda b, h, i, j: i == j))
    with pytest.raises(ValueError, match="a mask given as a function"):
        attend(q, q, q, odd, (), "triton")
    with pytest.raises(ValueError, match="float64 queries"):
        attend(q.double(), q.double(), q.double(), plain, (), "triton")
    every, none = torch.ones(1, dtype=torch.bool), torch.zeros(1, 9, dtype=torch.bool)
    many = replace(plain, edits=(BlockScores(every, none, none),) * 16)
    assert Triton().why_not(q, q, many) == "more than 15 blocked sets of pairs"
    scattered = [torch.arange(9)[None] >> bit & 1 == 1 for bit in range(4)]
    edits = [Rescale(every, keys, ~keys, 0.5) for keys in scattered]
    assert Triton().why_not(q, q, plain, edits) is None
    wide = torch.randn(1, 1, 40, 4, device=DEVICE)
    scattered = [torch.arange(40)[None] >> bit & 1 == 1 for bit in range(5)]
    edits = [Rescale(every, keys, ~keys, 0.5) for keys in scattered]
    assert (
        Triton().why_not(wide, wide, replace(plain, mask=Mask(40, 40)), edits)
        == "edits of more than 16 classes of keys"
    )
    assert Triton().why_not(q, q, plain, (MixIdentity(every, 0.5),)) is None
    with pytest.raises(ValueError, match="more than 16 groups"):
        Triton().attend(q, q, q, plain, (), ("mass",), torch.ones(17, 9, dtype=torch.bool))
