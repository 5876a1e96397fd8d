"""Time and memory of recording all default statistics on the CPU, beside the bare model and the usual ways, in one run.

`python benchmarks/record_cpu.py [--lengths 1024 4096] [--json FILE]`. The model is Llama-like with random weights, 4
layers, 16 query heads over 4 key heads, d=512, float32: cost does not depend on the weights. Each subject runs in a
process of its own, so that peak memory is its own; subjects take turns. Figures are medians with their spread, and
ratios are to the bare SDPA forward of the same length. A subject whose dense maps would not fit is computed, not run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB = 4, 16, 4, 512, 1000
SUBJECTS = ("sdpa", "headwater", "eager", "transformer_lens")
SETUP = f"""
import json, resource, sys, time, torch
torch.set_num_threads(int(sys.argv[3])); torch.manual_seed(0)
from transformers import LlamaConfig, LlamaForCausalLM
length, repeats = int(sys.argv[1]), int(sys.argv[2])
config = LlamaConfig(vocab_size={VOCAB}, hidden_size={WIDTH}, intermediate_size=1376, num_hidden_layers={LAYERS},
    num_attention_heads={HEADS}, num_key_value_heads={KV_HEADS}, max_position_embeddings=65536)
hf = LlamaForCausalLM(config).eval()
ids = torch.randint(0, {VOCAB}, (1, length))
"""
RUN = {
    "sdpa": "hf.set_attn_implementation('sdpa')\ndef run(x):\n    with torch.no_grad(): hf(x, use_cache=False)\n",
    "headwater": "import headwater as hw\nmodel = hw.load(hf)\ndef run(x): return model.record(x, keep=())\n",
    "eager": """
hf.set_attn_implementation('eager')
def run(x):
    with torch.no_grad(): maps = hf(x, use_cache=False, output_attentions=True).attentions
    n = torch.arange(x.shape[1])
    for w in maps:  # the same statistics, from the map
        torch.special.entr(w).sum(-1), w.max(-1), w.diagonal(0, -2, -1), w.diagonal(-1, -2, -1), w[..., 0]
        torch.einsum('bhqk,qk->bhq', w, (n[:, None] - n).abs().float()), w.sum(-1), w.sum(-2)
""",
    "transformer_lens": """
from transformer_lens.model_bridge.sources import build_bridge_from_module
bridge = build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config)
def run(x):
    with torch.no_grad(): bridge.run_with_cache(x, names_filter=lambda name: name.endswith("hook_pattern"))
""",
}
MEASURE = """
run(ids[:, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
times = []
for _ in range(repeats):
    start = time.perf_counter(); run(ids); times.append(time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"seconds": times, "extra_bytes": peak * 1024}))
"""


def measure(subject: str, length: int, repeats: int, threads: int) -> dict:
    """One subject in its own process; the reason where it was not run."""
    dense = 4 * LAYERS * HEADS * length**2
    if subject == "transformer_lens" and find_spec("transformer_lens") is None:
        return {"not_run": "transformer-lens is not installed"}
    # eager keeps every map; with its softmax and mask temporaries about twice that is alive at once
    if subject in ("eager", "transformer_lens") and 2 * dense > available():
        return {
            "not_run": f"its maps need {dense / 1e9:.1f} GB, by calculation, and as much again while they are made"
        }
    done = subprocess.run(
        [sys.executable, "-c", SETUP + RUN[subject] + MEASURE, str(length), str(repeats), str(threads)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        return {"not_run": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    times = found["seconds"]
    return {
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
        "extra_mb": found["extra_bytes"] / 1e6,
    }


def available() -> int:
    import psutil

    return psutil.virtual_memory().available


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    rows = []
    for length in args.lengths:
        results = {subject: measure(subject, length, args.repeats, args.threads) for subject in SUBJECTS}
        base = results["sdpa"]
        for subject, found in results.items():
            rows.append({"length": length, "subject": subject} | found)
            if "not_run" in found:
                print(f"{length:>7} {subject:<17} not run: {found['not_run']}", flush=True)
                continue
            rows[-1]["time_ratio"] = found["median_s"] / base["median_s"]
            print(
                f"{length:>7} {subject:<17} {found['median_s']:8.2f} s ({found['min_s']:.2f} to {found['max_s']:.2f})  "
                f"{rows[-1]['time_ratio']:6.2f} × sdpa  {found['extra_mb']:8.0f} MB extra", flush=True,
            )  # fmt: skip
    report = {
        "what": __doc__.split("\n")[0] if __doc__ else "",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": args.threads,
        },
        "versions": {name: version(name) for name in ("headwater", "torch", "transformers")},
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
