"""What a sweep costs beside its units, and whether kills, lost workers and full disks change a number.

`python benchmarks/sweeps.py PART [--engine local] [--json FILE]`, where PART is one of

    ledger      a million units that compute nothing: rows entered, commits of one unit and of many, reading, bytes
    merge       the seconds of merging shards, for each 1,000 units
    efficiency  units per second of two workers beside one, each with one thread, on the same machine
    kills       20 SIGKILLs of the driver at random moments, then the digest beside that of a quiet run

A digest that differs ends the run with an error, and nothing is written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import headwater as hw
from headwater.analyses._sweeps.ledger import Ledger

TEXT = "Mary gave John a drink and John went to the store"
HEADWATER = [sys.executable, "-m", "headwater"]
MANY = 1_000_000
KILLS = 20


def sweep_file(folder: Path, prompts: int) -> Path:
    """A sweep of so many prompts, each of its own length, under two lists of edits."""
    texts = [f"{TEXT} {'and Mary ' * (n % 7)}".strip() for n in range(prompts)]
    texts = [f"{text} {n}" for n, text in enumerate(texts)]
    off = hw.ScaleHeads({"1.1": 0.0}).to_dict()
    asked = {
        "model": "tasks-4l", "prompts": texts, "edits": {"none": [], "off": [off]},
        "analyses": [{"analysis": "head_importance"}, {"analysis": "rollout"}],
    }  # fmt: skip
    path = folder / "sweep.json"
    path.write_text(json.dumps(asked))
    return path


def ledger(folder: Path, engine: str) -> dict[str, Any]:
    """Costs of the ledger alone."""
    keys = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(MANY)]
    path = folder / "ledger.sqlite"
    with Ledger(path) as opened:
        enter = timed(lambda: opened.add(zip(keys, range(MANY), strict=True)))

        def one_by_one() -> None:
            for key in keys[:1000]:
                with opened.writing():
                    opened.done(key, key, 3000, 0.1)

        def together() -> None:
            for start in range(1000, 101_000, 100):
                with opened.writing():
                    for key in keys[start : start + 100]:
                        opened.done(key, key, 3000, 0.1)

        single, hundred = timed(one_by_one), timed(together)
        count = timed(opened.counts)
        read = timed(lambda: sum(1 for _ in opened.rows()))
    return {
        "units": MANY,
        "enter_s": enter,
        "commits_of_one_per_s": 1000 / single,
        "units_per_s_in_hundreds": 1e5 / hundred,
        "count_s": count,
        "read_all_s": read,
        "bytes_per_unit": path.stat().st_size / MANY,
    }


def merge(folder: Path, engine: str) -> dict[str, Any]:
    """Merging four shards that were computed here."""
    file = sweep_file(folder, 100)
    for n in range(1, 5):
        subprocess.run([*HEADWATER, "sweep", file, "--shard", f"{n}/4", "--out", folder / f"{n}"], check=True)
    seconds = timed(lambda: hw.merge_runs([folder / str(n) for n in range(1, 5)], folder / "merged"))
    found = hw.SweepRun(folder / "merged")
    return {"units": found.counts()["done"], "seconds_per_1000": seconds / found.counts()["done"] * 1000}


def efficiency(folder: Path, engine: str) -> dict[str, Any]:
    """Units per second of one worker and of two, from the first finished unit to the last: opening is told apart."""
    file = sweep_file(folder, 60)
    rates, digests = {}, set()
    for workers in (1, 2):
        moments: list[tuple[float, int]] = []
        run = hw.run_sweep(
            hw.Sweep.open(file), folder / f"{workers}", base=folder, workers=workers, engine=engine,  # type: ignore[arg-type]
            tell=lambda done, of, seen=moments: seen.append((time.perf_counter(), done)),
        )  # fmt: skip
        (begun, first), (ended, last) = moments[4], moments[-1]
        rates[workers] = (last - first) / (ended - begun)
        digests.add(run.digest())
    same(digests)
    return {"per_s_of_one": rates[1], "per_s_of_two": rates[2], "efficiency": rates[2] / rates[1] / 2}


def kills(folder: Path, engine: str) -> dict[str, Any]:
    """The driver is killed at random moments; its run is taken up each time."""
    file = sweep_file(folder, 60)
    command = [*HEADWATER, "sweep", file, "--workers", "2", "--engine", engine]
    draw, done = random.Random(0), []
    for _ in range(KILLS):
        run = subprocess.Popen([*command, "--out", folder / "killed"], stderr=subprocess.DEVNULL)
        there = files(folder / "killed")
        while run.poll() is None and files(folder / "killed") < there + 1:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.4)
        run.send_signal(signal.SIGKILL)
        run.wait()
        counts = hw.SweepRun(folder / "killed").counts()
        assert not list(hw.SweepRun(folder / "killed").damaged())
        done.append(counts["done"])
    for out in ("killed", "quiet"):
        subprocess.run([*command, "--out", folder / out], check=True, stdout=subprocess.DEVNULL)
    same({hw.SweepRun(folder / out).digest() for out in ("killed", "quiet")})
    return {"kills": KILLS, "done_after_each": done, "left_over": len(list(folder.rglob("*.part")))}


def files(folder: Path) -> int:
    return len(list(folder.glob("units/*/*.safetensors")))


def same(digests: set[str]) -> None:
    if len(digests) != 1:
        raise SystemExit(f"the results differ: {sorted(digests)}")


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


PARTS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "ledger": ledger, "merge": merge, "efficiency": efficiency, "kills": kills,
}  # fmt: skip


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("part", choices=PARTS)
    asked.add_argument("--engine", default="local", choices=("local", "ray"))
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="headwater-sweeps-"))
    load = os.getloadavg()[0]
    try:
        found = PARTS[given.part](folder, given.engine)
    finally:
        shutil.rmtree(folder)
    machine = {"processors": os.cpu_count(), "load_before": load, "machine": platform.machine()}
    machine |= {"torch": torch.__version__, "headwater": hw.__version__, "python": platform.python_version()}
    told = {
        "part": given.part,
        "engine": given.engine,
        **found,
        **machine,
        "when": datetime.now(UTC).isoformat(),
    }
    text = json.dumps(told, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
