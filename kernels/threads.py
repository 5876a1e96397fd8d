"""Pieces of a walk over a map, a thread for each, so that no thread waits for another in the middle of a piece.

torch divides one operation between its threads and waits at its end until all are done. A walk over a map is thousands
of operations of less than a millisecond. Where another process holds a core, each of them waits for a thread that does
not run. Here one thread computes a whole piece, many operations, with itself alone, and a thread that was held up
takes fewer pieces. What a piece gives does not depend on the number of threads.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

Piece = TypeVar("Piece")
Result = TypeVar("Result")

AHEAD = 2  # pieces that are asked for before their turn, for each thread
_making = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}  # by number of threads and their priority
_inside = threading.local()
if hasattr(os, "register_at_fork"):
    # a child process has none of its parent's threads
    os.register_at_fork(after_in_child=_pools.clear)


def mapped(
    work: Callable[[Piece], Result], pieces: Iterable[Piece], device: torch.device
) -> Iterator[Result]:
    """`work(piece)` of every piece, in order, computed on the CPU by as many threads as torch has.

    `work` may write where no other piece reads or writes, and under autograd nowhere. The caller computes where that
    gains nothing or other threads could not know what it has switched on: on a GPU, with one thread or one piece,
    inside of another piece, under autocast and under a dispatch mode of torch.

    >>> import torch
    >>> from headwater.kernels.threads import mapped
    >>> list(mapped(lambda n: n * n, range(4), torch.device("cpu")))
    [0, 1, 4, 9]
    """
    threads, pieces = torch.get_num_threads(), iter(pieces)
    first = list(islice(pieces, 2))
    pieces = chain(first, pieces)
    alone_already = threads == 1 or len(first) < 2 or getattr(_inside, "piece", False)
    if (
        alone_already
        or device.type != "cpu"
        or torch.is_autocast_enabled("cpu")
        or _get_current_dispatch_mode()
    ):
        yield from map(work, pieces)
        return
    inference, learning = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def alone(piece: Piece) -> Result:
        with torch.inference_mode(inference), torch.set_grad_enabled(learning):
            return work(piece)

    pool = _pool(threads)
    asked: deque[Future[Result]] = deque()
    try:
        for piece in pieces:
            asked.append(pool.submit(alone, piece))
            if len(asked) > AHEAD * threads:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()
    finally:
        # after an error or Ctrl-C: nothing may write to the caller's tensors any more
        for future in asked:
            if not future.cancel():
                future.exception()


def _pool(threads: int) -> ThreadPoolExecutor:
    # threads inherit the priority of the one that starts them, and may not raise it again
    priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) if sys.platform == "linux" else 0
    with _making:
        pool = _pools.get((threads, priority))
        if pool is None:
            pool = ThreadPoolExecutor(threads, "headwater", _alone)
            together = threading.Barrier(threads + 1)
            for _ in range(threads):
                pool.submit(together.wait)
            together.wait()
            _pools[threads, priority] = pool
            # each of them has set the number for itself, and for threads that torch has not met yet
            torch.set_num_threads(threads)
        return pool


def _alone() -> None:
    _inside.piece = True
    # torch gives a thread that it meets for the first time the number of all others: so it is to meet this one first
    torch.get_num_threads()
    torch.set_num_threads(1)
