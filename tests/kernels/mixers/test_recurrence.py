"""The recurrence in chunks, and what `mixer_map.py` asks of every map of such a layer."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from recurrences import example, per_head, recur
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headwater.kernels.mixers import recurrence as file
from headwater.kernels.mixers.recurrence import RecurrenceMap
from headwater.kernels.reference import mixers as reference

KINDS = [(delta, vector) for delta in (False, True) for vector in (False, True)]


def of(given: Mapping[str, Tensor], delta: bool = False) -> RecurrenceMap:
    return RecurrenceMap(given["q"], given["k"], given["log_decay"], given["write"], delta)


def made(length: int, delta: bool, vector: bool) -> tuple[RecurrenceMap, dict[str, Tensor]]:
    given = example(length, vector=vector)
    return of(given, delta), given


@pytest.mark.parametrize(("delta", "vector"), KINDS)
@pytest.mark.parametrize("length", [1, 7, 75])
def test_products_are_the_recurrence_and_its_adjoint(length: int, delta: bool, vector: bool) -> None:
    map, given = made(length, delta, vector)
    q, k = (per_head(given[n], 4) for n in ("q", "k"))
    v = given["v"].requires_grad_()
    expected = recur(q, k, given["log_decay"].exp(), given["write"], v, delta)
    torch.testing.assert_close(map @ v.detach(), expected.detach())
    y = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (adjoint,) = torch.autograd.grad(expected, v, y)
    torch.testing.assert_close(map.T @ y, adjoint)


@pytest.mark.parametrize(("delta", "vector"), KINDS)
def test_windows_and_rows_are_the_dense_formula(
    monkeypatch: pytest.MonkeyPatch, delta: bool, vector: bool
) -> None:
    monkeypatch.setattr(file, "CHUNK", 4)
    map, given = made(11, delta, vector)
    q, k = (per_head(given[n], 4) for n in ("q", "k"))
    dense = reference.recurrence(q, k, given["log_decay"].exp(), given["write"], delta)
    torch.testing.assert_close(map.dense(), dense)
    torch.testing.assert_close(map.tile(slice(3, 9), slice(2, 6), [3, 1]), dense[:, [3, 1], 3:9, 2:6])
    for rows, weights in map.row_blocks([2], elements=2 * 11 * 3):
        assert rows.stop - rows.start <= 3
        torch.testing.assert_close(weights, dense[:, [2], rows])
    shares = dense.abs() / dense.abs().sum(-1, keepdim=True)
    for elements in (1, 2**22):
        found = torch.cat([block for _, block in map.mean_shares(elements)], 1)
        torch.testing.assert_close(found, shares.mean(1))


def test_rates_are_a_decay_of_each_row_of_the_state() -> None:
    map, given = made(20, True, False)
    rates = 1 + torch.arange(12, dtype=torch.float64).view(4, 3)
    spelled = of({**given, "log_decay": given["log_decay"] * rates[:, None]}, True)
    found = replace(map, rates=rates)
    torch.testing.assert_close(found @ given["v"], spelled @ given["v"])
    torch.testing.assert_close(found.dense(), spelled.dense())


def test_a_reset_forgets_what_came_before_and_leaves_the_rest_exact() -> None:
    given = example(30, vector=True)
    given["log_decay"][:, :, 2:9] = -torch.inf
    q, k = (per_head(given[n], 4) for n in ("q", "k"))
    exact = recur(q, k, given["log_decay"].exp(), given["write"], given["v"], False)
    map = of({name: x.float() for name, x in given.items()})
    torch.testing.assert_close((map @ given["v"]).double(), exact, rtol=1e-5, atol=1e-5)
    assert not map.dense()[:, :, 8:, :8].any()


def test_strong_decay_over_a_long_text_keeps_float32_exact() -> None:
    given = {name: x[:1] for name, x in example(600, groups=4).items()}
    given["log_decay"] = given["log_decay"] * 8
    exact, single = of(given), of({name: x.float() for name, x in given.items()})
    torch.testing.assert_close(
        (single @ given["v"].float()).double(), exact @ given["v"], rtol=1e-4, atol=1e-5
    )


def test_heads_go_in_groups_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    map, given = made(40, True, True)
    whole, back = map @ given["v"], map.T @ given["v"]
    monkeypatch.setattr(file, "BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(map @ given["v"], whole)
    torch.testing.assert_close(map.T @ given["v"], back)


def test_no_tensor_is_as_large_as_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    length = 1000
    given = {name: x[:1] for name, x in example(length, d=2, heads=1, groups=1).items()}
    map = of(given, True)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            sizes = [
                x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if hasattr(x, "numel")
            ]
            largest = max([largest, *sizes])
            return out

    with Watch():
        _ = map @ given["v"], map.T @ given["v"]
        map.tile(slice(length - 8, length), slice(0, length))
    assert largest <= 20 * length


def test_operands_that_do_not_fit_are_refused_with_the_shapes_that_do() -> None:
    map, _ = made(5, False, False)
    with pytest.raises(ValueError, match=r"batch=2, head=4, key=5; got \(4, 1\)"):
        _ = map @ torch.ones(4, 1)
    with pytest.raises(ValueError, match="a slice without a step"):
        map.tile(slice(0, 5, 2), slice(None))
    assert map.T.shape == map.shape == (2, 4, 5, 5)
