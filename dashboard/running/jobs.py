"""Long work beside the pages, in lanes: of each model one job at a time in each lane, with progress and cancel.

Light work does not wait for long work, nor does a run of the model on an input; a short run waits for nothing else.
Where the system keeps a priority per thread, the pages come before all jobs but short runs.

`ask` gives the job of a key, begun by whoever asks first and shared by all who ask for the same. Its result is kept by
the key, within a number of bytes. A job ends early when nobody waits for it any more: its thread raises `Cancelled` at
the next step or attention layer, and nothing is kept of it. Edits, hooks and gates live in the context of the thread:
a job that ends early leaves none.
"""

from __future__ import annotations

import contextvars
import logging
import os
import secrets
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil

from headwater.dashboard.running import held
from headwater.dashboard.state.kept import Kept
from headwater.lens.errors import HeadwaterError
from headwater.lens.progress import telling

Lane = Literal["long", "light", "run", "short run"]
WORKERS = max(3, (os.cpu_count() or 2) // 2)  # jobs at once, beside short runs
GONE = 30.0  # seconds after which a session that is away waits no more; a reload takes less
LOOK = 1.0  # seconds between two looks at who still waits
FAULTS = 64
NICENESS = 5  # of the threads of jobs, added to that of the server as in nice(1)
results = Kept(min(2**30, psutil.virtual_memory().total // 16))
_lock = threading.RLock()
_jobs: OrderedDict[Hashable, Job] = (
    OrderedDict()
)  # those that wait or run, in the order in which they were asked for
_running: dict[tuple[str, Lane], Job] = {}
_faults: OrderedDict[Hashable, str] = OrderedDict()
_quick: dict[str, threading.RLock] = {}


class Cancelled(BaseException):
    """Nobody waits for the job; no error that an analysis may catch."""


@dataclass
class Waiter:
    """A session that waits: `here` says whether it is still there, `seen` when it last was."""

    here: Callable[[], bool]
    seen: float = field(default_factory=time.monotonic)

    def waits(self) -> bool:
        now = time.monotonic()
        if self.here():
            self.seen = now
        return now - self.seen < GONE


@dataclass(eq=False)
class Job:
    """Work of one key. `what` says for whom it is read, such as "importance of each head"; `done` of `total` `unit`s
    are counted; `error` is one line; `ended` is set when it is done, failed or cancelled."""

    key: Hashable
    work: Callable[[], Any]
    what: str
    model: str
    lane: Lane = "long"
    kept: Kept = field(default_factory=lambda: results)
    waiters: dict[str, Waiter] = field(default_factory=dict)
    running: bool = False
    ended: threading.Event = field(default_factory=threading.Event)
    result: Any = None
    error: str | None = None
    begun: float = 0.0
    step: str = ""
    unit: str = ""
    done: int = 0
    total: int | None = None
    _step_begun: float = 0.0
    _looked: float = 0.0
    _unwanted: bool = False
    _context: contextvars.Context = field(default_factory=contextvars.copy_context)

    @property
    def place(self) -> tuple[str, Lane]:
        return self.model, self.lane

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self.begun if self.running else 0.0

    @property
    def rest(self) -> float | None:
        """About how many seconds the steps that are counted now will still take; None before the first is done."""
        if not self.running or not self.total or not 0 < self.done <= self.total:
            return None
        return (time.monotonic() - self._step_begun) * (self.total - self.done) / self.done

    def tell(self, step: str, done: int, total: int | None, unit: str) -> None:
        if (step, total) != (self.step, self.total) or done < self.done or not done:
            self._step_begun = time.monotonic()
        self.step, self.done, self.total, self.unit = step, done, total, unit

    def check(self) -> None:
        """Raise `Cancelled` if nobody waits."""
        now = time.monotonic()
        if now - self._looked >= LOOK:
            self._looked = now
            _drop_absent(self)
        if self._unwanted:
            raise Cancelled


def ask(
    key: Hashable, work: Callable[[], Any], what: str, model: str, who: str = "",
    here: Callable[[], bool] = lambda: True, lane: Lane = "long", kept: Kept | None = None,
) -> Job:  # fmt: skip
    """The job of this key: done already, failed before, under way, or begun now by `work` in a thread of its own.

    `work` draws nothing and never gives None; it runs with the context variables of whoever asked first.
    Work waits for the work of its model in the same lane; `light` is that of a few seconds. Its result goes to `kept`.
    `who` waits for it until it calls `leave`, or is no longer `here`.
    """
    with _lock:
        if key in _jobs:
            job = _jobs[key]
            job.waiters[who] = Waiter(here)
            return job
        job = Job(key, work, what, model, lane, results if kept is None else kept, {who: Waiter(here)})
        job.result, job.error = job.kept.get(key), _faults.get(key)
        if job.result is not None or job.error is not None:
            job.ended.set()
            return job
        _jobs[key] = job
        _begin_next()
        return job


def leave(key: Hashable, who: str = "") -> None:
    """`who` waits no more. The job goes on while others do; otherwise it is cancelled and makes room at once."""
    with _lock:
        job = _jobs.get(key)
        if job is None:
            return
        job.waiters.pop(who, None)
        if not job.waiters:
            _give_up(job)


def fault(key: Hashable) -> str | None:
    """Why the work of this key failed, in one line; None where it did not."""
    with _lock:
        return _faults.get(key)


def again(key: Hashable) -> None:
    """Forget that the work of this key failed."""
    with _lock:
        _faults.pop(key, None)


def before(job: Job) -> Job | None:
    """The job that runs on the same model, for one that waits its turn."""
    with _lock:
        return None if job.running else _running.get(job.place)


@contextmanager
def quick(model: str) -> Iterator[None]:
    """Inside, no other quick run is at the model; a job may be. One at a time bounds memory, not correctness."""
    with _lock:
        turn = _quick.setdefault(model, threading.RLock())
    with turn, held.using(model):
        yield


def unforeseen(error: BaseException) -> str:
    """Log a fault that nobody foresaw; gives the line that says where to find it, without its insides."""
    name = secrets.token_hex(3)
    logging.getLogger("headwater.dashboard").error("fault %s", name, exc_info=error)
    return f"Headwater met a fault that it did not foresee. The terminal that runs it tells more, under fault {name}."


def _begin_next() -> None:
    """Start the jobs that wait longest for a model that is free, while there are workers."""
    for job in list(_jobs.values()):
        if not job.running:
            _drop_absent(job)
        full = job.lane != "short run" and len(_running) >= WORKERS
        if full or job.running or job._unwanted or job.place in _running:
            continue
        job.running, job.begun = True, time.monotonic()
        _running[job.place] = job
        # it ends with the process: nobody waits for a job once the server has stopped
        threading.Thread(
            target=job._context.run, args=(_work, job), name=f"job {job.what}", daemon=True
        ).start()


def _work(job: Job) -> None:
    if job.lane != "short run" and sys.platform == "linux":
        # Linux keeps it per thread, and the threads that torch starts for this one inherit it
        with suppress(OSError):
            os.nice(NICENESS)
    try:
        with held.using(job.model), telling(job.tell, job.check):
            job.check()
            result = job.work()
        job.kept.put(job.key, result)
        job.result = result
    except HeadwaterError as error:
        job.error = str(error)
    except Cancelled:
        pass
    except BaseException as error:  # whatever it is, whoever waits must be told
        job.error = unforeseen(error)
    with _lock:
        job.running = False
        del _running[job.place]
        if _jobs.get(job.key) is job:
            del _jobs[job.key]
        if job.error is not None and not job._unwanted:
            _faults[job.key] = job.error
            while len(_faults) > FAULTS:
                _faults.popitem(last=False)
        _begin_next()
    job.ended.set()


def _drop_absent(job: Job) -> None:
    """Forget the sessions that are gone; the job is cancelled when none is left."""
    with _lock:
        job.waiters = {who: waiter for who, waiter in job.waiters.items() if waiter.waits()}
        if not job.waiters:
            _give_up(job)


def _give_up(job: Job) -> None:
    job._unwanted = True
    if _jobs.get(job.key) is job:
        del _jobs[job.key]
    if not job.running:
        job.ended.set()
