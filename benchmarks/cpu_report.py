"""What the CPU benchmarks share: a child process per subject, its time and peak memory, and the report's head."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

MOST_SPREAD = 0.2  # of a bare pass within one run: a fifth
# Run in the child: `measured(call, repeats)` prints wall time, CPU time of all threads and memory above what was there
MEASURED = """
import ctypes, gc, json, os, re, resource, time
def _status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
def measured(call, repeats):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what a warm-up left free is not taken for memory that is in use
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew: what loading took is not counted
    before, wall, cpu = _status("VmRSS"), [], []
    for _ in range(repeats):
        used, start = time.process_time(), time.perf_counter()
        call()
        wall.append(time.perf_counter() - start); cpu.append(time.process_time() - used)
    peak = _status("VmHWM")
    print(json.dumps({"wall": wall, "cpu": cpu, "extra": peak - before, "peak": peak}))
"""


def in_a_process(code: str, *arguments: int, threads: int, exact_memory: bool = False) -> dict[str, Any]:
    """Figures of a script that ends in a call of `measured`, or why there are none.

    `exact_memory` gives every block of a megabyte back to the system when it is freed (glibc), which takes time. Else
    the peak counts holes that the allocator keeps, and these differ from run to run by half of a bare pass.
    """
    allocator = {"MALLOC_MMAP_THRESHOLD_": str(2**20)} if exact_memory else {}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED + code, *map(str, arguments)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | allocator,
    )  # fmt: skip
    if done.returncode:
        return {"not_run": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "wall_s": statistics.median(found["wall"]),
        "wall_spread_s": [min(found["wall"]), max(found["wall"])],
        "cpu_s": statistics.median(found["cpu"]),
        "cpu_min_s": min(found["cpu"]),
        "repeats": len(found["wall"]),
        "extra_mb": found["extra"] / 1e6,
        "peak_mb": found["peak"] / 1e6,
    }


def time_and_memory(code: str, *arguments: int, repeats: int, threads: int) -> dict[str, Any]:
    """`in_a_process` twice: `repeats` runs for their time, and one run with `exact_memory`.

    The script gets `arguments`, the number of runs and the number of threads.
    """
    found = in_a_process(code, *arguments, repeats, threads, threads=threads)
    if "not_run" in found:
        return found
    memory = in_a_process(code, *arguments, 1, threads, threads=threads, exact_memory=True)
    if "not_run" in memory:
        return memory
    return found | {name: memory[name] for name in ("extra_mb", "peak_mb")}


def bare_pass() -> float:
    """Seconds of a fixed pass of fused attention and matrix products, the median of some; nothing of ours is in it."""
    x, w = torch.ones(1, 8, 1024, 64), torch.ones(1024, 1024)
    seconds = []
    with torch.no_grad():
        for _ in range(15):
            start = time.perf_counter()
            for _ in range(3):
                torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
                w @ w
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[5:])


def head(what: str, threads: int) -> dict[str, Any]:
    """Machine, versions and commit of a report."""
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in about.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "what": what,
        "machine": {
            "processor": names[0] if names else platform.processor() or platform.machine(),
            "vector_instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": threads,
            "memory_gb": round(memory / 1e9, 1),
            "load_before": os.getloadavg()[0],
            "bare_pass_s": [bare_pass()],
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("headwater", "torch", "transformers", "transformer-lens")},
        "commit": _git("rev-parse", "--short", "HEAD")
        + (" with changes" if _git("status", "--porcelain") else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def earlier(path: Path, report: dict[str, Any], anew: bool = False) -> dict[str, Any]:
    """What the file of a run that was stopped holds, to go on from; empty where its versions were others.

    The machine and commit of that run are kept in the report beside its own, since some rows come from there.
    """
    if anew or not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept.get("versions") != report["versions"]:
        return {}
    head = {name: kept[name] for name in ("machine", "commit", "date")}
    report["earlier_runs"] = [*kept.get("earlier_runs", []), head]
    return kept


def refuse_unsteady(report: dict[str, Any], *bare: Sequence[float]) -> None:
    """End the benchmark, with nothing written, if a bare pass varied by more than a fifth: the machine was not idle.

    `bare` are the seconds of bare passes that the benchmark measured, each of one kind. The pass that `head` timed is
    timed again.
    """
    report["machine"]["bare_pass_s"].append(bare_pass())
    for seconds in (report["machine"]["bare_pass_s"], *bare):
        if max(seconds) > (1 + MOST_SPREAD) * min(seconds):
            sys.exit(
                f"not reported: the bare pass took {min(seconds):.3f} to {max(seconds):.3f} s in this run, more than a "
                "fifth apart; run the benchmark again when nothing else runs"
            )


def write(report: dict[str, Any], path: Path) -> None:
    report["machine"]["load_after"] = os.getloadavg()[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()
