"""Speed and memory of the Triton kernels on a GPU, beside fused attention of others, in one run of under ten minutes.

`PYTHONPATH=. python benchmarks/gpu.py [--lengths 4096 16384] [--json FILE]`; needs torch with CUDA and the triton it
brings, nothing else. Correctness comes first: a red check ends the run. Then, for B=1, H=32, bfloat16, causal and not,
subjects take turns on the same tensors with the L2 cache cleared before each call; a figure is the median with its
quartiles. The floating-point operations and bytes stated are those the mathematics needs, not what a kernel issues.
Without a GPU it prints 'no GPU' and exits with code 2.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwater.kernels import reference, triton_backend
from headwater.kernels.edits import Rescale
from headwater.kernels.mask import Mask
from headwater.kernels.operator import AttentionMap
from headwater.kernels.rule import ScoreRule

HEADS = 32
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
WIDTHS = (64, 128)
# each new length is compiled anew, which takes several seconds
FLEX_LENGTHS = (4096, 16384, 65536)
# dense maps in float32 and their copies: 32 heads at 8192 tokens are 8.6 GB each
EAGER_LENGTHS = (4096, 8192)
STATISTICS = ("entropy", "max", "argmax", "self", "previous", "first", "distance", "row_mass")
SPENT = 0.4  # seconds of calls per subject and problem, at least three calls
# subject, against which subject, at most how many times its time (D=64, D=128)
TARGETS = (
    ("plain", "flex", 1.0, 1.0),
    ("entropy", "plain", 1.15, 1.15),
    ("rows", "plain", 1.25, 1.25),
    ("received", "plain", 0.85, 0.75),
    ("record", "plain", 2.1, 2.1),
    ("edited", "plain", 1.15, 1.15),
)


@dataclass
class Problem:
    """q, k, v [1, head, length, width] in bfloat16, the rule, and an edit of four keys in half of the heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    rule: ScoreRule
    edit: Rescale

    @classmethod
    def of(cls, length: int, width: int, causal: bool, heads: int = HEADS) -> Problem:
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(1, heads, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        rule = ScoreRule(width**-0.5, Mask(length, length, right=0 if causal else None))
        sinks = torch.arange(length)[None] < 4
        return cls(q, k, v, rule, Rescale(torch.arange(heads) < heads // 2, sinks, ~sinks, 0.4))

    @property
    def causal(self) -> bool:
        return self.rule.mask.right == 0


def subjects(p: Problem) -> dict[str, Callable[[], Any]]:
    """What is measured: ours under short names, peers under theirs."""
    q, k, v, rule = p.q, p.k, p.v, p.rule
    length = q.shape[2]
    lse = triton_backend.attend(q, k, v, rule).lse

    def record() -> Any:
        result = triton_backend.attend(q, k, v, rule, (), STATISTICS)
        return result, triton_backend.received(q, k, rule, result.lse)

    found: dict[str, Callable[[], Any]] = {
        "plain": lambda: triton_backend.attend(q, k, v, rule),
        "entropy": lambda: triton_backend.attend(q, k, v, rule, (), ("entropy",)),
        "rows": lambda: triton_backend.attend(q, k, v, rule, (), STATISTICS),
        "received": lambda: triton_backend.received(q, k, rule, lse),
        "record": record,
        "edited": lambda: triton_backend.attend(q, k, v, rule, (p.edit,)),
        "sdpa_flash": lambda: _sdpa(p, SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": lambda: _sdpa(p, SDPBackend.CUDNN_ATTENTION),
    }
    if length in FLEX_LENGTHS:
        found["flex"] = _flex(p)
    if length in EAGER_LENGTHS:
        found["eager"] = lambda: _eager(p)
    return found


def _sdpa(p: Problem, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(p.q, p.k, p.v, is_causal=p.causal)


def _flex(p: Problem) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = p.q.shape[2]
    mask = None
    if p.causal:
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, length, length, device="cuda", _compile=True
        )
    call = torch.compile(flex_attention, dynamic=False)
    return lambda: call(p.q, p.k, p.v, block_mask=mask)


def _eager(p: Problem) -> tuple[Tensor, ...]:
    """The map, and the same statistics from it."""
    scores = (p.q @ p.k.mT).float() * p.rule.scale
    place = torch.arange(scores.shape[-1], device="cuda")
    apart = place[:, None] - place
    if p.causal:
        scores.masked_fill_(apart < 0, float("-inf"))
    weights = scores.softmax(-1)
    del scores
    return (
        weights.to(p.v.dtype) @ p.v, torch.special.entr(weights).sum(-1), *weights.max(-1), weights.sum(-2),
        torch.einsum("bhqk,qk->bhq", weights, apart.abs().float()), weights.sum(-1), weights[..., 0],
        weights.diagonal(0, -2, -1), weights.diagonal(-1, -2, -1),
    )  # fmt: skip


def check(width: int, causal: bool) -> dict[str, float]:
    """Largest errors against float64 at 515 tokens; raises where one exceeds what bfloat16 allows."""
    p = Problem.of(515, width, causal, heads=4)
    host = [x.float().cpu() for x in (p.q, p.k, p.v)]
    errors: dict[str, float] = {}

    def compare(name: str, actual: Tensor, expected: Tensor, allowed: float) -> None:
        errors[name] = float((actual.double().cpu() - expected.double()).abs().max())
        if not errors[name] <= allowed:
            raise SystemExit(
                f"red: {name} at d={width} causal={causal} is off by {errors[name]:.3g} > {allowed}"
            )

    for title, edits in (("", ()), ("edited ", (p.edit,))):
        result = triton_backend.attend(p.q, p.k, p.v, p.rule, edits, STATISTICS)
        dense = reference.attend(*host, p.rule, edits)
        wanted = reference.statistics(dense, p.rule)
        # weights are rounded to bfloat16 before they meet the values, and the output once more
        compare(title + "output", result.z, dense.z, 4e-2)
        compare(title + "lse", result.lse, dense.lse, 1e-4)
        for name in STATISTICS:
            if name != "argmax":
                compare(title + name, result.found[name], wanted[name], 5e-2 if name == "distance" else 2e-4)
        top = dense.weights.gather(-1, result.found["argmax"].cpu()[..., None])[..., 0]
        compare(title + "argmax", top, wanted["max"], 2e-4)
        map = AttentionMap.of(p.q, p.k, p.rule, result.lse, result.steps, "triton")
        compare(title + "received", map.statistic("received"), wanted["received"], 2e-3)
        ones = torch.ones(515, 1, device="cuda")
        compare(title + "P^T 1", (map.T @ ones)[..., 0], wanted["received"], 5e-3)
        again = AttentionMap.of(p.q, p.k, p.rule, result.lse, result.steps, "triton").statistic("received")
        if not torch.equal(again, map.statistic("received")):
            raise SystemExit("red: the key-major pass gave other bits in a second run")
    return errors


def measure(calls: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
    """Milliseconds (median, quartiles) and peak extra bytes of each subject; subjects take turns."""
    flush = torch.empty(2**27, dtype=torch.int8, device="cuda")
    results: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            call()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            first = _time(call, flush)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            results[name] = {"failed": str(error).splitlines()[0][:200]}
            continue
        results[name] = {"extra_bytes": torch.cuda.max_memory_allocated() - before}
        times[name] = [first]
    rounds = {name: min(max(round(SPENT * 1e3 / seen[0]), 3), 30) for name, seen in times.items()}
    for turn in range(max(rounds.values(), default=0)):
        for name in times:
            if turn < rounds[name]:
                times[name].append(_time(calls[name], flush))
    for name, seen in times.items():
        low, middle, high = statistics.quantiles(seen[1:], n=4)
        results[name] |= {"ms": middle, "ms_quartiles": [low, high], "calls": len(seen) - 1}
    return results


def _time(call: Callable[[], Any], flush: Tensor) -> float:
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def work(p: Problem) -> dict[str, float]:
    """Operations of the forward pass and of the key-major pass, and bytes of q, k, v and the output."""
    length, width = p.q.shape[2:]
    pairs = HEADS * length * (length + 1) / 2 if p.causal else HEADS * length**2
    return {
        "forward_flop": 4 * pairs * width, "received_flop": 2 * pairs * width, "bytes": 4 * p.q.numel() * 2,
    }  # fmt: skip


def compare_with_targets(row: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for subject, base, *limits in TARGETS:
        if "ms" in row["subjects"].get(subject, {}) and "ms" in row["subjects"].get(base, {}):
            ratio = row["subjects"][subject]["ms"] / row["subjects"][base]["ms"]
            limit = limits[WIDTHS.index(row["d"])]
            found.append(
                {"subject": subject, "to": base, "ratio": ratio, "limit": limit, "held": ratio <= limit}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/gpu-DEVICE-DATE.json")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU")
        sys.exit(2)
    import triton

    torch._dynamo.config.recompile_limit = 64
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
        "memory": torch.cuda.get_device_properties(0).total_memory, "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "commit": head.stdout.strip() or None, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": {"batch": 1, "heads": HEADS, "dtype": "bfloat16"}, "errors": {}, "rows": [],
    }  # fmt: skip
    for width in WIDTHS:
        for causal in (True, False):
            report["errors"][f"d={width} causal={causal}"] = check(width, causal)
    print("correct; measuring", flush=True)
    for length in given.lengths:
        for width in WIDTHS:
            for causal in (True, False):
                p = Problem.of(length, width, causal)
                row: dict[str, Any] = {"length": length, "d": width, "causal": causal, **work(p)}
                row["subjects"] = measure(subjects(p))
                row["targets"] = compare_with_targets(row)
                report["rows"].append(row)
                _show(row)
                del p
                torch.cuda.empty_cache()
    name = report["device"].replace(" ", "-").lower()
    path = given.json or Path(__file__).parent / "results" / f"gpu-{name}-{report['date'][:10]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


def _show(row: dict[str, Any]) -> None:
    print(f"S={row['length']} d={row['d']} {'causal' if row['causal'] else 'full'}", flush=True)
    for name, seen in row["subjects"].items():
        if "failed" in seen:
            print(f"  {name:12} {seen['failed']}")
            continue
        rate = row["received_flop" if name == "received" else "forward_flop"] / seen["ms"] / 1e9
        low, high = seen["ms_quartiles"]
        print(
            f"  {name:12} {seen['ms']:9.3f} ms ({low:.3f} to {high:.3f})  {rate:6.0f} TFLOP/s  "
            f"{seen['extra_bytes'] / 2**20:8.0f} MiB extra"
        )
    for target in row["targets"]:
        verdict = "held" if target["held"] else "missed"
        print(
            f"  {target['subject']}/{target['to']} {target['ratio']:.2f}, at most {target['limit']}: {verdict}"
        )


if __name__ == "__main__":
    main()
