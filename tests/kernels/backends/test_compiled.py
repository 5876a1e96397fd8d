"""The backend `compiled`: z and statistics of one walk, when it is taken, and what it refuses.

Seen to fail with column sums that count rows of padding, with statistics of silent rows left at 0, and with a choice
that does not look at what is asked for.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparison import within
from plain_maps import MASKS, build

pytest.importorskip("numba", reason="the compiled loops need the extra [fast]")

from headwater.kernels.attend import attend
from headwater.kernels.backends import compiled
from headwater.kernels.backends.choose import choose
from headwater.kernels.backends.compiled import Compiled
from headwater.kernels.compiled import walks
from headwater.kernels.edits.scores import ScaleScores
from headwater.kernels.edits.weights import MixIdentity
from headwater.kernels.maps import statistics
from headwater.kernels.reference import dense as reference
from headwater.kernels.tiles.mask import Mask

NAMES = Compiled.free


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walks, "LEAST", 0)


def check(q, k, v, rule, exact: float = 3e-5):
    """z and every statistic, without another walk, held to the reference."""
    z, map = attend(q, k, v, rule, statistics=NAMES)
    assert set(map.known) == set(NAMES)
    dense = reference.attend(q, k, v, rule)
    torch.testing.assert_close(z.double(), dense.z, atol=exact, rtol=1e-4)
    if (real := rule.mask.valid_queries) is not None:
        dense = dense._replace(weights=dense.weights * real[:, None, :, None])
    expected, found = reference.statistics(dense, rule), statistics.compute(map, (*NAMES, "lse"))
    for name in (*NAMES, "lse"):
        scale = {"distance": 100, "distance_squared": 1000, "received": 50, "entropy": 10}.get(name, 1)
        if name == "argmax":
            top = dense.weights.gather(-1, found[name].clamp_min(0)[..., None])[..., 0]
            within(top, expected["max"].nan_to_num(), exact, 1e-4, name)
            assert ((found[name] < 0) == (expected[name] < 0)).all()
            continue
        within(found[name], expected[name], exact * scale, 3e-5, name)
    return map


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("length", [64, 1100])
def test_every_statistic_under_every_band(kind: str, length: int) -> None:
    check(*build(MASKS[kind](length)))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("length", [64, 1100])
def test_learned_sinks(kind: str, length: int) -> None:
    q, k, v, rule = build(MASKS[kind](length), sinks=True)
    check(q, k, v, rule)
    of_each_query = torch.randn(2, 4, q.shape[2], generator=torch.Generator().manual_seed(1)) * 3
    check(q, k, v, replace(rule, sinks=of_each_query))


@pytest.mark.parametrize("logit", [-torch.inf, -1e4, 1e4])
def test_sinks_that_take_nothing_or_everything(logit: float) -> None:
    q, k, v, rule = build(MASKS["causal"](90))
    plain, map = attend(q, k, v, rule, statistics=NAMES)
    z, taken = attend(q, k, v, replace(rule, sinks=torch.full((4,), logit)), statistics=NAMES)
    if logit < 0:
        torch.testing.assert_close(z, plain)
        torch.testing.assert_close(taken.known["entropy"], map.known["entropy"])
    else:
        assert not z.any()
        assert not taken.known["row_mass"].any()
        assert not taken.known["entropy"].any()
        torch.testing.assert_close(taken.lse, torch.full_like(taken.lse, logit))


def test_padding_at_the_ends_differs_by_batch_row() -> None:
    positions = torch.arange(290)
    real = torch.stack([positions >= 100, positions < 270, positions < 0])
    check(*build(Mask(290, 290, right=0, valid_keys=real, valid_queries=real), batch=3))


def test_equal_and_one_hot_rows() -> None:
    check(*build(MASKS["causal"](300), size=0.0), exact=1e-6)
    _, map = attend(*build(MASKS["causal"](300), size=1e3), statistics=NAMES)
    found = statistics.compute(map, NAMES)
    assert (found["max"] <= 1).all()
    assert (found["entropy"] >= 0).all()
    torch.testing.assert_close(found["row_mass"], torch.ones_like(found["row_mass"]), atol=1e-6, rtol=0)


def test_numbers_are_those_of_two_walks_and_of_other_sets_of_statistics() -> None:
    problem = build(MASKS["causal"](700))
    z, map = attend(*problem, statistics=NAMES)
    plain_z, plain = attend(*problem)
    torch.testing.assert_close(z, plain_z, atol=1e-5, rtol=1e-5)
    assert not plain.known
    found, other = statistics.compute(map, NAMES), statistics.compute(plain, NAMES)
    few_z, few = attend(*problem, statistics=("received", "lse", "max"))
    assert few_z.equal(z)
    assert few.known["received"].equal(map.known["received"])
    for name in NAMES:
        if name != "argmax":
            torch.testing.assert_close(
                found[name], other[name], equal_nan=True, atol=2e-4, rtol=1e-5, msg=name
            )


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walks, "PART", 2**10)
    problem = build(MASKS["causal"](600))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            z, map = attend(*problem, statistics=NAMES)
            found.append({"z": z, "lse": map.lse, **map.known})
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for name, values in found[0].items():
            assert other[name].equal(values), name


def test_auto_takes_it_where_it_saves_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, rule = build(MASKS["causal"](60))

    def taken(statistics, q=q, k=k, rule=rule) -> str:
        return choose(q, k, rule, statistics=statistics).backend.name

    assert taken(statistics=statistics.DEFAULT) == taken(("received",)) == "compiled"
    assert taken(()) == taken(("lse", "visible")) == taken(("self", "first")) == taken(("mass",)) == "flash"
    assert (
        taken(("max",), q[:, :, :8], k, replace(rule, mask=Mask(8, 60, right=0, query_offset=52))) == "flash"
    )
    learned = q.clone().requires_grad_()
    assert taken(("max",), learned) == "flash"
    z, map = attend(q, k, v.clone().requires_grad_(), rule, statistics=("max",))
    assert z.requires_grad
    assert not map.known
    z, map = attend(q, k, v, rule, statistics=("max",), differentiable=True)
    assert map.backend == "blocked"
    assert taken(("max",), q.double(), k.double()) == "flash"
    monkeypatch.setattr(walks, "LEAST", 2**21)
    assert taken(("max",)) == "flash"
    monkeypatch.setattr(walks, "LEAST", 0)
    monkeypatch.setattr(walks, "loops", lambda: None)
    assert taken(("max",)) == "flash"
    with pytest.raises(ValueError, match="compiled can not compute anything before numba is installed"):
        choose(q, k, rule, backend="compiled")


def test_auto_takes_it_behind_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "WINDOWED", 0)
    q, k, v, rule = build(MASKS["window"](90), sinks=True)
    assert (
        choose(q, k, rule).backend.name == choose(q, k, rule, statistics=("lse",)).backend.name == "compiled"
    )
    assert choose(q, k, rule, statistics=None).backend.name == "blocked"
    exact = reference.attend(q, k, v, rule)
    z, map = attend(q, k, v, rule)
    torch.testing.assert_close(z.double(), exact.z, atol=3e-5, rtol=1e-4)
    x = torch.randn(90, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close((map @ x).double(), exact.weights @ x.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(map.received().double(), exact.weights.sum(-2), atol=1e-4, rtol=1e-5)
    for moved in ("causal", "full", "cache", "cross"):
        q, k, v, rule = build(MASKS[moved](90))
        assert choose(q, k, rule).backend.name == "flash"
    q, k, v, rule = build(MASKS["window"](90), sinks=True)
    z, _ = attend(q, k, v.requires_grad_(), rule)
    assert z.requires_grad
    learned = replace(rule, sinks=rule.sinks.requires_grad_())
    z, _ = attend(q, k, v.detach(), learned)
    assert z.requires_grad
    monkeypatch.setattr(compiled, "WINDOWED", 2**24)
    assert choose(q, k, rule).backend.name == "blocked"


def test_what_it_refuses_is_computed_as_before() -> None:
    q, k, v, rule = build(MASKS["causal"](40))
    every, holes = torch.ones(4, dtype=torch.bool), torch.ones(2, 40, dtype=torch.bool)
    holes[0, 20] = False
    sinks, cases = torch.zeros(4), []
    cases += [
        (replace(rule, softcap=3.0), ()),
        (replace(rule, alibi=sinks), ()),
    ]
    cases += [(replace(rule, bias=torch.zeros(1, 1, 40, 40)), ()), (rule, (MixIdentity(every, 0.5),))]
    cases += [(replace(rule, edits=(ScaleScores(every, 2.0),)), ())]
    cases += [(replace(rule, mask=replace(rule.mask, valid_keys=holes)), ())]
    cases += [(replace(rule, mask=replace(rule.mask, documents=torch.zeros(1, 40).long())), ())]
    for other, edits in cases:
        _, map = attend(q, k, v, other, edits, statistics=NAMES)
        assert not map.known
        with pytest.raises(ValueError, match="compiled can not compute"):
            attend(q, k, v, other, edits, "compiled", NAMES)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_what_overflows_is_seen_in_the_log_sum_exp(bad: float) -> None:
    q, k, v, rule = build(MASKS["causal"](40))
    q[0, 1, 7, 3] = bad
    k[k > 0] += 2
    _, map = attend(q, k, v, rule, statistics=NAMES)
    assert not map.known
    assert map.lse[0, 1, 7].isnan()
    assert map.lse[1].isfinite().all()
