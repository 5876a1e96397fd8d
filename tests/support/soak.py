"""Long work: thousands of units of a sweep and of texts of a corpus, with the memory and the ledger's time on the way.

`python tests/support/soak.py UNITS TEXTS` prints a line of JSON for each. Memory is the most in each tenth of the time,
so that it shows whether it goes on growing. The sweep's worker is in the same process.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import sweep_engines
import torch

import headwater as hw
from headwater.analyses._sweeps import ledger, run_sweep, worker

PARTS, EVERY = 10, 0.05  # of the time; seconds between two looks at the memory
WORDS = ["When", "Mary", "and", "John", "went", "to", "the", "store", ",", "John", "gave", "a", "drink", "to"]


def text(number: int) -> str:
    """Another for each number, of 6 to 12 words."""
    size = len(WORDS)
    return " ".join(WORDS[number // size**place % size] for place in range(6 + number % 7))


@contextmanager
def weighed() -> Iterator[list[tuple[float, int]]]:
    """The times and bytes of this process while the block runs."""
    found: list[tuple[float, int]] = []
    ended, process = threading.Event(), psutil.Process()

    def look() -> None:
        while not ended.wait(EVERY):
            found.append((time.monotonic(), process.memory_info().rss))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield found
    finally:
        ended.set()
        looking.join()


def told(name: str, count: int, work: Callable[[], Any]) -> dict[str, Any]:
    """How long the work takes, the most memory in each tenth of that, and what a piece adds in the second half."""
    begun = time.monotonic()
    with weighed() as found:
        work()
    seconds = time.monotonic() - begun
    most = [0] * PARTS
    for moment, size in found:
        part = min(PARTS - 1, int((moment - begun) / seconds * PARTS))
        most[part] = max(most[part], size)
    grown = (most[-1] - most[PARTS // 2]) / (count * (PARTS // 2 - 1) / PARTS)
    return {
        "name": name, "count": count, "seconds": round(seconds), "memory_mb": [round(each / 1e6) for each in most],
        "kb_each": round(grown / 1e3, 2),
    }  # fmt: skip


def sweep(units: int) -> dict[str, Any]:
    """A sweep of so many units, and how long the ledger took to bring each change to the disk."""
    model = hw.load("tasks-4l")
    asked = sweep_engines.asked(prompts=[text(n) for n in range(units)], analyses=[{"analysis": "sink_rate"}])
    commits: list[float] = []
    leave = ledger._Transaction.__exit__

    def timed(self: Any, *error: Any) -> None:
        begun = time.monotonic()
        leave(self, *error)
        commits.append(time.monotonic() - begun)

    with (
        tempfile.TemporaryDirectory() as made,
        mock.patch.object(run_sweep, "open_model", return_value=model),
        mock.patch.object(worker, "open_model", return_value=model),
        mock.patch.object(run_sweep, "_engine", lambda kind, setup, *_: sweep_engines.Here(setup, {})),
        mock.patch.object(ledger._Transaction, "__exit__", timed),
    ):
        found = told(
            "units of a sweep", units, lambda: run_sweep.run_sweep(asked, Path(made) / "a.run", workers=1)
        )
        counts = hw.SweepRun(Path(made) / "a.run").counts()
    assert counts == {"queued": 0, "done": units, "failed": 0}, counts
    median, late = np.quantile(commits, [0.5, 0.99]) * 1000
    return found | {"commit_ms": round(float(median), 2), "slow_commit_ms": round(float(late), 2)}


def corpus(texts: int) -> dict[str, Any]:
    """Statistics of every head over so many texts."""
    model = hw.load("tasks-4l")
    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "texts.jsonl"
        file.write_text("".join(json.dumps({"text": text(n)}) + "\n" for n in range(texts)))
        return told(
            "texts of a corpus", texts, lambda: hw.corpus(model, file, out=Path(made) / "a.safetensors")
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for work, count in ((sweep, sys.argv[1]), (corpus, sys.argv[2])):
        print(json.dumps(work(int(count))), flush=True)
