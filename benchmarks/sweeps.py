"""What a sweep costs beside its units, and whether kills and a full disk change a number; docs/scale.md tells it.

`python benchmarks/sweeps.py [ledger driver kills disk efficiency]`; each part goes to benchmarks/results/sweeps.json
when it is done.

    ledger      a million rows: entered, committed one by one and in hundreds, counted, read, their bytes
    driver      1,000 workers that compute nothing, with 20,000 units in four shards; then the merge of the shards
    kills       20 SIGKILLs of the driver at random moments; the digest beside that of a quiet run
    disk        a run folder on a file system that is full in the middle of the run, then larger (root, Linux)
    efficiency  units per second of two workers beside one, each with one thread: on an idle machine

A promise that does not hold ends the run with an error, and nothing of its part is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import headwater as hw
from headwater.analyses._sweeps.drive import Driver
from headwater.analyses._sweeps.ledger import Ledger
from headwater.analyses._sweeps.sweep_run import LEDGER, Manifest, begin, of_bytes

RESULTS = Path(__file__).parent / "results" / "sweeps.json"
HEADWATER = [sys.executable, "-m", "headwater"]
TEXT = "Mary gave John a drink and John went to the store"
ROWS = 1_000_000
UNITS, SHARDS, WORKERS = 20_000, 4, 1000
KILLS = 20
CONTENT = b"0" * 3000  # of a unit that computes nothing


def sweep_file(folder: Path, prompts: int) -> Path:
    """A sweep of so many prompts of several lengths, under two lists of edits."""
    texts = [f"{TEXT} {'and Mary ' * (n % 7)}{n}" for n in range(prompts)]
    asked = {
        "model": "tasks-4l", "prompts": texts,
        "edits": {"none": [], "off": [hw.ScaleHeads({"1.1": 0.0}).to_dict()]},
        "analyses": [{"analysis": "head_importance"}, {"analysis": "rollout"}],
    }  # fmt: skip
    path = folder / "sweep.json"
    path.write_text(json.dumps(asked))
    return path


def ledger(folder: Path) -> dict[str, Any]:
    keys = [of_number(n) for n in range(ROWS)]
    path = folder / LEDGER
    with Ledger(path) as opened:

        def done(some: Sequence[str]) -> None:
            with opened.writing():
                for key in some:
                    opened.done(key, key, 3000, 0.1)

        entered = timed(lambda: opened.add(zip(keys, range(ROWS), strict=True)))
        single = timed(lambda: [done(keys[n : n + 1]) for n in range(1000)])
        hundreds = timed(lambda: [done(keys[n : n + 100]) for n in range(1000, 101_000, 100)])
        counted = timed(opened.counts)
        read = timed(lambda: sum(1 for _ in opened.rows()))
    return {
        "units": ROWS,
        "enter_s": entered,
        "per_s_one_by_one": 1000 / single,
        "per_s_in_hundreds": 1e5 / hundreds,
        "count_s": counted,
        "read_s": read,
        "bytes_per_unit": path.stat().st_size / ROWS,
    }


class Nothing:
    """Workers whose files are there already: each answers one task between two waits of the driver."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.tasks: dict[int, deque[Mapping[str, Any]]] = {}
        self.new: list[int] = []

    def open(self) -> int:
        number = len(self.tasks) + 1
        self.tasks[number] = deque()
        self.new.append(number)
        return number

    def give(self, worker: int, tasks: Sequence[Mapping[str, Any]]) -> None:
        self.tasks[worker].extend(tasks)

    def wait(self, seconds: float) -> list[tuple[int, dict[str, Any]]]:
        opened = [(number, {"kind": "opened", "facts": self.facts}) for number in self.new]
        self.new.clear()
        told = {"kind": "done", "digest": of_bytes(CONTENT), "bytes": len(CONTENT), "seconds": 0.1}
        return opened + [(number, told) for number, tasks in self.tasks.items() if tasks and tasks.popleft()]

    def retire(self, worker: int) -> None:
        del self.tasks[worker]

    def close(self) -> None:
        self.tasks.clear()


def driver(folder: Path) -> dict[str, Any]:
    sweep = hw.Sweep(
        model="tasks-4l", prompts=[TEXT], analyses=[{"analysis": "agreement"}], seeds=list(range(UNITS))
    )
    seconds = 0.0
    for shard in range(1, SHARDS + 1):
        path = folder / str(shard)
        path.mkdir()
        facts = {"nothing": True}
        run = begin(path, Manifest(sweep.model_dump(mode="json"), facts, ".", (shard, SHARDS)))
        with Ledger(path / LEDGER) as opened:
            opened.add((of_number(n), n) for n in range(shard - 1, UNITS, SHARDS))
            for row in opened.rows():
                file = run.file(row.key)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(CONTENT)
            asked = Driver(run, opened, Nothing(facts), WORKERS, lambda text: None, lambda done, of: None)
            seconds += timed(asked.drive)
        held(run.counts()["done"] == UNITS // SHARDS, run)
    folders = [folder / str(shard) for shard in range(1, SHARDS + 1)]
    merging = timed(lambda: hw.merge_runs(folders, folder / "merged"))
    merged = hw.SweepRun(folder / "merged")
    held(merged.counts()["done"] == UNITS and not list(merged.damaged()), merged)
    return {
        "units": UNITS,
        "workers": WORKERS,
        "shards": SHARDS,
        "units_per_s": UNITS / seconds,
        "merge_s_per_1000": merging / UNITS * 1000,
    }


def kills(folder: Path) -> dict[str, Any]:
    """Three in four kills fall where units are written, the others where the driver starts."""
    file = sweep_file(folder, 200)
    command = [*HEADWATER, "sweep", file, "--workers", "2", "--out"]
    out, draw, done = folder / "killed", random.Random(0), []
    for n in range(KILLS):
        before = files(out)
        run = subprocess.Popen([*command, out], stderr=subprocess.DEVNULL)
        while n % 4 and run.poll() is None and files(out) == before:
            time.sleep(0.01)
        time.sleep(draw.random() * (0.3 if n % 4 else 6))
        run.send_signal(signal.SIGKILL)
        held(run.wait() == -signal.SIGKILL, "the run ended before it was killed")
        there = (out / LEDGER).is_file()
        done.append(hw.SweepRun(out).counts()["done"] if there else 0)
        held(not there or not list(hw.SweepRun(out).damaged()), "a file is not what its row says")
    same(command, out, folder / "quiet")
    counts = hw.SweepRun(out).counts()
    held(counts["done"] == sum(counts.values()), counts)
    return {"units": counts["done"], "kills": KILLS, "done_after_each": done, "left_over": left_over(folder)}


def disk(folder: Path) -> dict[str, Any]:
    """The file system of the run folder holds a part of the results; then it is made larger, and the run goes on."""
    file, out = sweep_file(folder, 20), folder / "full"
    command = [*HEADWATER, "sweep", file, "--workers", "2", "--out"]
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320k", "sweep", out], check=True)
    try:
        run = subprocess.run([*command, out], capture_output=True, text=True)
        held(run.returncode == 2 and "make room" in run.stderr, run.stderr)
        done = hw.SweepRun(out).counts()["done"]
        held(0 < done < 80, done)
        subprocess.run(["mount", "-o", "remount,size=40m", "sweep", out], check=True)
        same(command, out, folder / "quiet")
    finally:
        subprocess.run(["umount", out], check=True)
    return {"units": 80, "done_when_full": done, "left_over": left_over(folder)}


def efficiency(folder: Path) -> dict[str, Any]:
    """From the first finished units to the last: the time in which workers open the model is not counted."""
    file = sweep_file(folder, 60)
    rates: dict[int, float] = {}
    for workers in (1, 2):
        seen: list[tuple[float, int]] = []
        hw.run_sweep(
            hw.Sweep.open(file), folder / f"{workers}", base=folder, workers=workers,
            tell=lambda done, of, seen=seen: seen.append((time.perf_counter(), done)),
        )  # fmt: skip
        (begun, first), (ended, last) = seen[8], seen[-1]
        rates[workers] = (last - first) / (ended - begun)
    held(len({hw.SweepRun(folder / n).digest() for n in "12"}) == 1, "the results differ")
    return {"per_s_of_one": rates[1], "per_s_of_two": rates[2], "efficiency": rates[2] / rates[1] / 2}


def same(command: list[Any], out: Path, quiet: Path) -> None:
    """Take the run up to its end, and run the sweep undisturbed: the results are the same, bit for bit."""
    for folder in (out, quiet):
        subprocess.run([*command, folder], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    held(not list(hw.SweepRun(out).damaged()), "a file is not what its row says")
    held(hw.SweepRun(out).digest() == hw.SweepRun(quiet).digest(), "the results differ")


def held(right: bool, what: Any) -> None:
    if not right:
        raise SystemExit(f"this does not hold: {what}")


def files(folder: Path) -> int:
    return len(list(folder.glob("units/*/*.safetensors")))


def left_over(folder: Path) -> int:
    return len(list(folder.rglob("*.part")))


def of_number(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """Where and when, and how busy the machine was."""
    return {
        "date": datetime.now(UTC).date().isoformat(), "processors": os.cpu_count(), "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


PARTS = {each.__name__: each for each in (ledger, driver, kills, disk, efficiency)}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("parts", nargs="+", choices=PARTS)
    for part in asked.parse_args().parts:
        about = machine()
        with tempfile.TemporaryDirectory(prefix="headwater-") as folder:
            found = about | PARTS[part](Path(folder))
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(kept | {part: found}, indent=1) + "\n")
        print(part, json.dumps(found))


if __name__ == "__main__":
    main()
