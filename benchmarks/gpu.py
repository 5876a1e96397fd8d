"""Speed and memory of the Triton kernels on a GPU, beside fused attention of others, in one run of under ten minutes.

`PYTHONPATH=. python benchmarks/gpu.py [--lengths 4096 16384] [--json FILE]`; needs torch with CUDA and the triton it
brings; flash-colreduce is a peer where it is installed. Correctness comes first: a red check ends the run with code 1
and no figure. Then, for B=1, H=32, bfloat16, causal and not, subjects take turns on the same tensors with the L2 cache
cleared before each call; a figure is the median with its quartiles. Operations and bytes are those that the mathematics
needs, not what a kernel issues; shares are of the peaks stated in PEAKS. `--tune` tries other tile sizes of ours.
Without a GPU it prints 'no GPU' and exits with code 2; `--dry-run` runs every line on the CPU, in Triton's interpreter,
on shapes so small that its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import torch  # noqa: E402
from gpu_subjects import CHECKED, Problem, Red, check, ours, peers  # noqa: E402
from torch import Tensor  # noqa: E402

from headwater.kernels.backends.triton.backend import Triton  # noqa: E402
from headwater.kernels.backends.triton.tile_sizes import Config, config  # noqa: E402
from headwater.kernels.rules.map_state import MapState  # noqa: E402
from headwater.lens.errors import first_line  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
HEADS = 2 if DRY else 32
LENGTHS = (128, 256) if DRY else (4096, 8192, 16384, 32768, 65536, 131072)
WIDTHS = (64, 128)
SPENT = 0.0 if DRY else 0.4  # seconds of calls per subject and problem, at least three calls
LIMIT = 540  # seconds after which no further problem is begun
# dense bfloat16 FLOP/s, bytes/s, exponentials/s (the last published for H100: FlashAttention-3, Shah et al. 2024)
PEAKS = {"H200": (989e12, 4.8e12, 3.9e12), "H100": (989e12, 3.35e12, 3.9e12), "A100": (312e12, 2.0e12, None)}
# subject, against which subject, at most how many times its time (D=64, D=128)
TARGETS = (
    ("plain", "flex", 1.0, 1.0),
    ("plain", "tutorial", 1.0, 1.0),
    ("entropy", "plain", 1.15, 1.15),
    ("rows", "plain", 1.25, 1.25),
    ("received", "plain", 0.85, 0.75),
    ("received_alone", "colreduce", 1 / 1.5, 1 / 1.5),
    ("record", "plain", 2.1, 2.1),
    ("edited", "plain", 1.15, 1.15),
)
RECORD_LENGTH, RECORD_BYTES = 131072, 4 * 2**30
ALTERNATIVES = {
    "rows": (
        Config(128, 128, 8, 2),
        Config(128, 64, 8, 3),
        Config(128, 64, 4, 3),
        Config(64, 64, 4, 3),
        Config(128, 32, 8, 3),
    ),
    "columns": (Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(128, 128, 8, 2), Config(64, 128, 4, 3)),
}


def measure(calls: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
    """Milliseconds (median, quartiles) and peak extra bytes of each subject; subjects take turns."""
    flush = torch.empty(1 if DRY else 2**27, dtype=torch.int8, device=DEVICE)
    results: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            call()
            before = _memory(reset=True)
            first = _time(call, flush)
        except (RuntimeError, ValueError, NotImplementedError) as error:  # out of memory is a RuntimeError
            results[name] = {"failed": first_line(error)[:200]}
            continue
        results[name] = {"extra_bytes": _memory() - before}
        times[name] = [first]
    fewest = 1 if DRY else 3
    rounds = {name: min(max(round(SPENT * 1e3 / seen[0]), fewest), 30) for name, seen in times.items()}
    for turn in range(max(rounds.values(), default=0)):
        for name in times:
            if turn < rounds[name]:
                times[name].append(_time(calls[name], flush))
    for name, seen in times.items():
        low, middle, high = statistics.quantiles(seen if DRY else seen[1:], n=4)
        results[name] |= {"ms": middle, "ms_quartiles": [low, high], "calls": len(seen) - 1}
    return results


def _memory(reset: bool = False) -> int:
    """Bytes held by tensors: now, having set the mark, or at most since then."""
    if DRY:
        return 0
    torch.cuda.synchronize()
    if not reset:
        return torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _time(call: Callable[[], Any], flush: Tensor) -> float:
    flush.zero_()
    if DRY:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def work(p: Problem) -> dict[str, float]:
    """Operations of the forward and of the key-major pass, exponentials of either, bytes of q, k, v and the output."""
    heads, length, width = p.q.shape[1:]
    pairs = heads * length * (length + 1) / 2 if p.causal else heads * length**2
    return {
        "forward_flop": 4 * pairs * width, "received_flop": 2 * pairs * width, "exponentials": pairs,
        "bytes": 4 * p.q.numel() * 2,
    }  # fmt: skip


def roofline(row: dict[str, Any], device: str) -> dict[str, float] | None:
    """Least milliseconds by each limit of the device: `forward`, `received` (products), exponentials, memory."""
    peak = next((limits for name, limits in PEAKS.items() if name in device), None)
    if peak is None:
        return None
    flop, byte, exponential = peak
    least = {
        "forward": row["forward_flop"] / flop, "received": row["received_flop"] / flop, "memory": row["bytes"] / byte,
    }  # fmt: skip
    if exponential:
        least["exponentials"] = row["exponentials"] / exponential
    return {name: seconds * 1e3 for name, seconds in least.items()}


def compare_with_targets(row: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for subject, base, *limits in TARGETS:
        if "ms" in row["subjects"].get(subject, {}) and "ms" in row["subjects"].get(base, {}):
            ratio = row["subjects"][subject]["ms"] / row["subjects"][base]["ms"]
            limit = limits[WIDTHS.index(row["d"])]
            found.append(
                {"subject": subject, "to": base, "ratio": ratio, "limit": limit, "held": ratio <= limit}
            )
    extra = row["subjects"].get("record", {}).get("extra_bytes")
    if row["length"] == RECORD_LENGTH and extra is not None:
        size, limit = extra / 2**30, RECORD_BYTES / 2**30
        entry = {"subject": "record, extra memory", "to": "1 GiB", "ratio": size, "limit": limit}
        found.append(entry | {"held": size < limit})
    return found


def tune(p: Problem) -> dict[str, Any]:
    """Milliseconds of the shipped tiles and of others, for the forward and the key-major pass."""
    lse = Triton().attend(p.q, p.k, p.v, p.rule).lse
    passes = {
        "rows": lambda tile: Triton(tile).attend(p.q, p.k, p.v, p.rule),
        "columns": lambda tile: Triton(tile).received(MapState(p.q, p.k, p.rule, lse)),
    }
    found: dict[str, Any] = {}
    for kernel, run in passes.items():
        shipped = config(kernel, p.q.shape[-1], 16)
        tiles = list(dict.fromkeys((shipped, *ALTERNATIVES[kernel])))
        seen = measure({str(tuple(tile)): partial(run, tile) for tile in tiles})
        found[kernel] = {"shipped": str(tuple(shipped)), "tried": seen}
        if DRY:
            continue
        best = min((n for n in seen if "ms" in seen[n]), key=lambda n: seen[n]["ms"])
        print(f"  {kernel} d={p.q.shape[-1]} shipped {tuple(shipped)}, fastest {best}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/gpu-DEVICE-DATE.json")
    parser.add_argument("--tune", action="store_true", help="try other tile sizes of ours at 16384 tokens")
    parser.add_argument(
        "--dry-run", action="store_true", help="every line on the CPU, tiny; the times mean nothing"
    )
    given = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("no GPU")
        sys.exit(2)
    start = time.monotonic()
    report = _head()
    try:
        for width in WIDTHS:
            for causal in (True, False):
                for length in (130,) if DRY else (CHECKED, 515):
                    key = f"d={width} causal={causal} {length} tokens"
                    report["errors"][key] = check(width, causal, DEVICE, length)
        if DRY:
            check(64, True, DEVICE, 128)
    except Red as error:
        print(f"red: {error}; nothing was measured")
        sys.exit(1)
    print("correct; measuring", flush=True)
    if not DRY:
        import tutorial_attention

        torch._dynamo.config.recompile_limit = 64
        for width in WIDTHS:
            for causal in (True, False):
                p = Problem.of(8192, width, causal, HEADS, DEVICE)
                tutorial_attention.tune(p.q, p.k, p.v, causal, p.rule.scale)
    for length in given.lengths:
        for width in WIDTHS:
            for causal in (True, False):
                if time.monotonic() - start > LIMIT:
                    report["left_out"].append({"length": length, "d": width, "causal": causal})
                    continue
                _measure_one(report, length, width, causal)
    if given.tune:
        length = 128 if DRY else 16384
        report["tiles"] = {width: tune(Problem.of(length, width, True, HEADS, DEVICE)) for width in WIDTHS}
    if not DRY:
        _summary(report)
    report["seconds"] = round(time.monotonic() - start)
    name = report["device"].replace(" ", "-").lower()
    path = given.json or Path(__file__).parent / "results" / f"gpu-{name}-{report['date'][:10]}.json"
    if DRY and not given.json:
        print("dry run: nothing was measured, nothing is written")
        return
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


def _head() -> dict[str, Any]:
    import triton

    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    card = None if DRY else torch.cuda.get_device_properties(0)
    return {
        "dry_run": DRY, "device": "dry run" if card is None else card.name,
        "capability": None if card is None else [card.major, card.minor],
        "memory": None if card is None else card.total_memory, "peaks": PEAKS, "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "commit": head.stdout.strip() or None, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": {"batch": 1, "heads": HEADS, "dtype": "bfloat16"}, "errors": {}, "rows": [], "left_out": [],
    }  # fmt: skip


def _measure_one(report: dict[str, Any], length: int, width: int, causal: bool) -> None:
    p = Problem.of(length, width, causal, HEADS, DEVICE)
    row: dict[str, Any] = {"length": length, "d": width, "causal": causal, **work(p)}
    row["least_ms"] = roofline(row, report["device"])
    others, row["absent"] = peers(p)
    row["subjects"] = measure({**ours(p), **others})
    row["targets"] = compare_with_targets(row)
    report["rows"].append(row)
    _show(row)
    del p
    if not DRY:
        torch.cuda.empty_cache()


def _show(row: dict[str, Any]) -> None:
    print(f"S={row['length']} d={row['d']} {'causal' if row['causal'] else 'full'}", flush=True)
    least = row["least_ms"]
    if least:
        print("  least ms: " + ", ".join(f"{name} {value:.3f}" for name, value in least.items()))
    for name, seen in row["subjects"].items():
        if "failed" in seen:
            print(f"  {name:14} failed: {seen['failed']}")
            continue
        if DRY:
            print(f"  {name:14} ran")
            continue
        which = "received" if name == "received" else "forward"
        rate = row[which + "_flop"] / seen["ms"] / 1e9
        low, high = seen["ms_quartiles"]
        share = f" {least[which] / seen['ms']:4.0%} of peak" if least else ""
        print(
            f"  {name:14} {seen['ms']:9.3f} ms ({low:.3f} to {high:.3f})  {rate:6.0f} TFLOP/s{share}  "
            f"{seen['extra_bytes'] / 2**20:8.0f} MiB extra"
        )
    for name, reason in row["absent"].items():
        print(f"  {name:14} not run: {reason}")


def _summary(report: dict[str, Any]) -> None:
    """The table of targets: over how many problems each was tried, held, and its worst ratio."""
    print("target (at most)                      tried  held  worst")
    seen: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        for target in row["targets"]:
            seen.setdefault((target["subject"], target["to"], target["limit"]), []).append(target)
    report["summary"] = []
    for (subject, base, limit), targets in seen.items():
        held, worst = sum(t["held"] for t in targets), max(t["ratio"] for t in targets)
        entry = {
            "subject": subject,
            "to": base,
            "limit": limit,
            "tried": len(targets),
            "held": held,
            "worst": worst,
        }
        report["summary"].append(entry)
        print(f"{subject} / {base} ({limit:.2f})".ljust(38) + f"{len(targets):5} {held:5}  {worst:5.2f}")
    for subject, base, *_ in TARGETS:
        if not any((subject, base) == key[:2] for key in seen):
            print(f"{subject} / {base}: not measured")
    if report["left_out"]:
        print(f"left out after {LIMIT} s: {len(report['left_out'])} problems")


if __name__ == "__main__":
    main()
