"""`drive`: gives the units of a run to workers until each is done or has failed, and keeps the ledger.

The driver alone writes the ledger. A unit is entered as done when its file lies in the run folder with the digest that
the worker told. A worker that dies is replaced, and the unit that it was on is tried again, three times in all. One
that can not write gives its unit back and is asked no more; when none is left, the run stops and can be resumed.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headwater.analyses._sweeps.ledger import Ledger, Row
from headwater.analyses._sweeps.processes import Answer, Engine
from headwater.analyses._sweeps.sweep_run import SweepRun, facts_differing
from headwater.lens.errors import SweepError

MOST_TRIES = 3
AHEAD = 2  # tasks of a worker: the one it is on, and the next one
WAIT = 1.0  # seconds
Say = Callable[[str], object]
Tell = Callable[[int, int], object]


@dataclass
class _Worker:
    tasks: deque[Row] = field(default_factory=deque)
    opened: bool = False


class Driver:
    """One drive of a run to its end. `say` hears lines of text, `tell` how many units are settled, of how many."""

    def __init__(
        self, run: SweepRun, ledger: Ledger, engine: Engine, workers: int, say: Say, tell: Tell
    ) -> None:
        self.run, self.ledger, self.engine = run, ledger, engine
        self.wanted, self.say, self.tell = workers, say, tell
        self.workers: dict[int, _Worker] = {}
        self.queue: deque[Row] = deque(ledger.rows("queued"))
        self.later: deque[Row] = deque()
        self.tries = {row.key: row.attempts for row in self.queue if row.attempts}
        counts = ledger.counts()
        self.settled, self.total = counts["done"] + counts["failed"], sum(counts.values())
        self.unopened = 0  # workers that died one after another before they were open
        self.unwritten = ""

    def drive(self) -> None:
        """Run every queued unit. SweepError where it can not go on."""
        self.tell(self.settled, self.total)
        if not self.queue:
            return
        firsts = self._firsts()
        self.queue, self.later = deque(firsts), self.queue
        self._finish()
        if self.later:
            self._estimate(firsts)
        self.queue, self.later = self.later, deque()
        self._finish()

    def _firsts(self) -> list[Row]:
        """The first queued unit of each analysis and settings: what they take tells what the rest will take."""
        ends = self.run.units.firsts
        block, found, rest = 0, [], deque()
        for row in self.queue:
            new = row.number >= ends[block]
            while row.number >= ends[block]:
                block += 1
            (found if new else rest).append(row)
        self.queue = rest
        return found

    def _finish(self) -> None:
        """Run the queue to its end."""
        while self.queue or any(worker.tasks for worker in self.workers.values()):
            while len(self.workers) < min(self.wanted, self._open_tasks()) and not self.unwritten:
                self.workers[self.engine.open()] = _Worker()
            if not self.workers:
                raise SweepError(
                    f"no worker can write: {self.unwritten}; make room, then `headwater sweep resume`"
                )
            for number, worker in self.workers.items():
                self._feed(number, worker)
            answers = self.engine.wait(WAIT)
            if answers:
                with self.ledger.writing():
                    for number, answer in answers:
                        self._heed(number, answer)
                self.tell(self.settled, self.total)

    def _open_tasks(self) -> int:
        return len(self.queue) + len(self.later) + sum(len(worker.tasks) for worker in self.workers.values())

    def _feed(self, number: int, worker: _Worker) -> None:
        if not worker.opened:
            return
        new = []
        ahead = AHEAD if len(self.queue) > len(self.workers) else 1  # the last ones are shared out
        while self.queue and len(worker.tasks) < ahead:
            row = self.queue.popleft()
            worker.tasks.append(row)
            new.append({"number": row.number, "key": row.key})
        if new:
            self.engine.give(number, new)

    def _heed(self, number: int, answer: Answer) -> None:
        """Take one answer into the ledger."""
        worker = self.workers.get(number)
        if worker is None:
            return
        kind = answer["kind"]
        if kind == "opened":
            if wrong := facts_differing(self.run.manifest.facts, answer["facts"]):
                raise SweepError(
                    f"a worker is not like its run: {wrong}; bring it to the same state, or begin a new run"
                )
            worker.opened, self.unopened = True, 0
        elif kind in ("unopened", "changed"):
            raise SweepError(answer["reason"])
        elif kind == "died":
            self._bury(number, worker, answer["reason"])
        elif kind == "disk":
            self.unwritten = answer["reason"]
            self.say(f"a worker can not write and is asked no more: {self.unwritten}")
            self.engine.retire(number)
            self.queue.extendleft(reversed(self.workers.pop(number).tasks))
        else:
            row = worker.tasks.popleft()
            if kind == "done":
                self._enter(row, answer)
            elif kind == "refused":
                self._fail(row, answer["reason"])
            else:
                self._again(row, answer["reason"])

    def _enter(self, row: Row, answer: Answer) -> None:
        """Enter a unit as done, when its file is where the driver looks for it."""
        done = Row(row.key, row.number, "done", 0, answer["digest"], answer["bytes"], answer["seconds"], None)
        if not self.run.is_whole(done):
            self._again(
                row,
                f"its file is not in {self.run.path}; the folder must be one that driver and workers share",
            )
            return
        self.ledger.done(row.key, done.digest or "", done.bytes or 0, done.seconds or 0.0)
        self.settled += 1

    def _again(self, row: Row, reason: str) -> None:
        """Try a unit once more, or give it up."""
        tries = self.tries[row.key] = self.tries.get(row.key, 0) + 1
        self.ledger.tried(row.key, reason)
        if tries >= MOST_TRIES:
            self._fail(row, f"{reason} ({tries} tries)")
        else:
            self.queue.append(row)

    def _fail(self, row: Row, reason: str) -> None:
        self.ledger.failed(row.key, reason)
        self.settled += 1

    def _bury(self, number: int, worker: _Worker, reason: str) -> None:
        """Give the tasks of a dead worker back; the first one is what it was on."""
        del self.workers[number]
        if not worker.opened:
            self.unopened += 1
            if self.unopened >= MOST_TRIES * max(1, self.wanted):
                raise SweepError(f"workers end before they have opened the model: {reason}")
            return
        if worker.tasks:
            self._again(worker.tasks.popleft(), reason)
        self.queue.extendleft(reversed(worker.tasks))

    def _estimate(self, firsts: Sequence[Row]) -> None:
        """Say what the rest will take; SweepError where it will not fit on the disk."""
        ends = self.run.units.firsts
        left = [0] * len(ends)
        block = 0
        for row in sorted(self.later, key=lambda row: row.number):
            while row.number >= ends[block]:
                block += 1
            left[block] += 1
        size = seconds = 0.0
        for first in firsts:
            row = self.ledger.row(first.key)
            block = next(n for n, end in enumerate(ends) if first.number < end)
            if row is not None and row.state == "done":
                size += left[block] * (row.bytes or 0)
                seconds += left[block] * (row.seconds or 0.0)
        free = shutil.disk_usage(self.run.path).free
        told = f"{len(self.later):,} units to go: about {_amount(size)} of {_amount(free)} free"
        self.say(f"{told}, about {_duration(seconds / self.wanted)} with {self.wanted} workers")
        if size > free:
            raise SweepError(
                f"{told}; there is not enough room in {self.run.path}; take a larger disk, or fewer units"
            )


def _amount(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
