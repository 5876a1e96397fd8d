"""Pieces side by side: in order, the same bits with any number of threads, and nothing left behind by an error.

Seen to fail with results not in order, the number of threads not set back or not set at all, nobody waited for after an
error, modes of gradients not handed on, threads of another priority, threads of the parent in a forked child, a part
that sums what all parts receive at once, and all rows of one head in one part.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headwater.kernels.attend import attend
from headwater.kernels.maps import statistics
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.threads import mapped
from headwater.kernels.tiles.mask import Mask

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_threads_of_one_thread_each() -> None:
    def work(n: int) -> tuple[int, str, int]:
        time.sleep(0.02 if n % 3 == 0 else 0)
        return n, threading.current_thread().name, torch.get_num_threads()

    found = list(mapped(work, range(20), CPU))
    assert [n for n, _, _ in found] == list(range(20))
    assert {threads for _, _, threads in found} == {1}
    assert len({name for _, name, _ in found}) == 3
    # neither the caller nor threads that torch meets later are left with one
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == 3
    assert others == [3]


def test_an_error_comes_out_after_the_pieces_that_run_have_ended() -> None:
    running: set[int] = set()

    def work(n: int) -> int:
        running.add(n)
        time.sleep(0.02)
        running.discard(n)
        if n == 1:
            raise ValueError("piece 1")
        return n

    with pytest.raises(ValueError, match="piece 1"):
        list(mapped(work, range(50), CPU))
    assert not running
    pieces = mapped(work, range(2, 50), CPU)
    next(pieces)
    pieces.close()
    assert not running


def test_the_caller_computes_what_other_threads_could_not() -> None:
    own = threading.current_thread().name

    def where(_: int) -> str:
        return threading.current_thread().name

    assert set(mapped(where, [0], CPU)) == {own}
    assert set(mapped(where, [0, 1], torch.device("meta"))) == {own}
    with torch.autocast("cpu"):
        assert set(mapped(where, [0, 1], CPU)) == {own}
    with TorchDispatchMode():
        assert set(mapped(where, [0, 1], CPU)) == {own}
    inside = list(mapped(lambda n: (where(n), set(mapped(where, [0, 1], CPU))), [0, 1], CPU))
    assert all({outer} == inner for outer, inner in inside)
    assert own not in {outer for outer, _ in inside}
    torch.set_num_threads(1)
    assert set(mapped(where, [0, 1], CPU)) == {own}


def test_modes_of_gradients_go_with_a_piece() -> None:
    def modes(_: int) -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    assert set(mapped(modes, [0, 1], CPU)) == {(True, False)}
    with torch.no_grad():
        assert set(mapped(modes, [0, 1], CPU)) == {(False, False)}
    with torch.inference_mode():
        assert set(mapped(modes, [0, 1], CPU)) == {(False, True)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own() -> None:
    list(mapped(abs, [0, 1], CPU))
    child = multiprocessing.get_context("fork").Process(target=lambda: list(mapped(abs, [0, 1], CPU)))
    child.start()
    child.join(20)
    ended = child.exitcode
    child.kill()
    assert ended == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a priority per thread")
def test_pieces_have_the_priority_of_their_caller() -> None:
    def niceness(_: int) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    usual, found = niceness(0), []

    def lower() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), usual + 1)
        found.extend(mapped(niceness, [0, 1, 2], CPU))

    thread = threading.Thread(target=lower)
    thread.start()
    thread.join()
    assert set(found) == {usual + 1}
    assert set(mapped(niceness, [0, 1, 2], CPU)) == {usual}


PADDED = torch.arange(300) >= torch.tensor([[0], [7], [250]])
SHAPES = {
    "many heads": (1, 8, Mask(700, 700, right=0)),
    "one head": (1, 1, Mask(900, 900, right=0)),
    "batch of padded texts": (3, 4, Mask(300, 300, right=0, valid_keys=PADDED)),
    "window": (1, 2, Mask(1000, 1000, left=100, right=0)),
    "cache": (1, 2, Mask(90, 3000, right=0, query_offset=2910)),
    "small": (1, 9, Mask(15, 15, right=0)),
}  # fmt: skip


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_numbers_are_the_same_bit_for_bit_with_any_number_of_threads(kind: str, edited: bool) -> None:
    batch, heads, mask = SHAPES[kind]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, mask.queries, 16, generator=generator)
    k, v = (torch.randn(batch, max(heads // 2, 1), mask.keys, 16, generator=generator) for _ in range(2))
    if heads % 2:
        k, v = (x[:, :1].expand(-1, 1, -1, -1) for x in (k, v))
    rule = ScoreRule(0.25, mask, softcap=30.0 if edited else None)
    with torch.no_grad():
        _, map = attend(q, k, v, rule)

        def numbers() -> dict[str, torch.Tensor]:
            found = statistics.compute(map, [n for n in statistics.NAMES if n != "mass"])
            found["top"], found["columns"] = map.topk(5)
            found["pooled"] = map.pooled(7, "mean")
            found["near"] = map.received(later=(1, 9))
            found["stripe"] = map.stripe(2)
            found["gather"] = map @ torch.arange(float(mask.keys))[:, None]
            found["scatter"] = map.T @ torch.arange(float(mask.queries))[:, None]
            return found

        torch.set_num_threads(1)
        expected = numbers()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            for name, values in numbers().items():
                same = torch.equal(values.nan_to_num(7.0), expected[name].nan_to_num(7.0))
                assert same, (name, threads)
