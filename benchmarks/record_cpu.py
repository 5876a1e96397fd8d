"""Time and memory of recording all default statistics on the CPU, beside the bare model and the usual ways, in one run.

`python benchmarks/record_cpu.py --lengths 1024 4096 16384 32768` (results go to
benchmarks/results/record_cpu.json). The model is Llama-like with random weights, 4 layers, 16 query heads over 4 key
heads, d=512, float32: cost does not depend on the weights. Subjects:

- sdpa: the bare forward pass of transformers with fused attention; ratios are to it.
- headwater: `model.record(x, keep=())`, every default statistic of every head, with the loops of the extra `fast`.
- headwater_torch: the same without that extra, by torch alone.
- eager: transformers with `output_attentions=True`, and the same statistics from its maps.
- transformer_lens: `run_with_cache` of the attention patterns, without any statistic.

First the statistics are compared with those of the eager maps at a short length; if they differ nothing is measured or
written. Each subject runs in a process of its own, and once in another for its memory: what one run takes above what
the loaded model takes, with an allocator that keeps no holes. CPU time is of all threads together, and says more than
wall time on a machine that others use. Where dense maps take too long or too much, what they need is computed and not
run.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cpu_report import head, in_a_process, refuse_unsteady, time_and_memory, write

LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB = 4, 16, 4, 512, 1000
SUBJECTS = ("sdpa", "headwater", "headwater_torch", "eager", "transformer_lens")
OURS = ("headwater", "headwater_torch")
DENSE = ("eager", "transformer_lens")
RESULTS = Path(__file__).parent / "results" / "record_cpu.json"
SETUP = f"""
import sys, torch
length, repeats, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads); torch.manual_seed(0)
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size={VOCAB}, hidden_size={WIDTH}, intermediate_size=1376, num_hidden_layers={LAYERS},
    num_attention_heads={HEADS}, num_key_value_heads={KV_HEADS}, max_position_embeddings=65536)
hf = LlamaForCausalLM(config).eval()
ids = torch.randint(0, {VOCAB}, (1, length))
def eager_statistics(x):
    hf.set_attn_implementation('eager')
    with torch.no_grad(): maps = hf(x, use_cache=False, output_attentions=True).attentions
    n, found = torch.arange(x.shape[1]), []
    for w in maps:
        top = w.max(-1)
        found.append({{"entropy": torch.special.entr(w).sum(-1), "max": top.values, "argmax": top.indices,
            "self": w.diagonal(0, -2, -1), "previous": torch.nn.functional.pad(w.diagonal(-1, -2, -1), (1, 0)),
            "first": w[..., 0], "distance": torch.einsum('bhqk,qk->bhq', w, (n[:, None] - n).abs().float()),
            "row_mass": w.sum(-1), "received": w.sum(-2)}})
    return found
"""
HEADWATER = "import headwater as hw\nmodel = hw.load(hf)\ndef run(x): return model.record(x, keep=())\n"
RUN = {
    "sdpa": "hf.set_attn_implementation('sdpa')\ndef run(x):\n    with torch.no_grad(): hf(x, use_cache=False)\n",
    "headwater": HEADWATER,
    "headwater_torch": "import os\nos.environ['NUMBA_DISABLE_JIT'] = '1'\n" + HEADWATER,
    "eager": "run = eager_statistics\n",
    "transformer_lens": """
from transformer_lens.model_bridge.sources import build_bridge_from_module
bridge = build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config)
def run(x):
    with torch.no_grad(): bridge.run_with_cache(x, names_filter=lambda name: name.endswith("hook_pattern"))
""",
}
# a prompt long enough that the loops are compiled before the clock starts
MEASURE = "run(ids[:, :512])\nmeasured(lambda: run(ids), repeats)\n"
CHECK = """
import headwater as hw
record = hw.load(hf).record(ids, keep=())
expected = eager_statistics(ids)
worst = 0.0
for layer, statistics in enumerate(expected):
    for name, exact in statistics.items():
        found = record.statistics[name][:, layer]
        if name == "argmax":
            assert (found == exact).float().mean() > 0.999, (layer, name)
            continue
        error = ((found - exact).abs() / (1 + exact.abs())).max().item()
        assert error < 1e-4, f"layer {layer}: {name} differs from eager by {error:.1e}"
        worst = max(worst, error)
sys.stderr.write(f"largest relative difference {worst:.1e}")
measured(lambda: None, 1)
"""


def dense_bytes(length: int) -> int:
    """What keeping every map takes, by calculation: float32 maps of all layers, and one layer's scores beside them."""
    return 4 * HEADS * length**2 * (LAYERS + 1)


def measure(subject: str, length: int, args: argparse.Namespace) -> dict[str, Any]:
    import psutil

    if subject in DENSE:
        needs = dense_bytes(length)
        if length > args.dense_up_to or 2 * needs > psutil.virtual_memory().available:
            return {
                "computed_mb": needs / 1e6,
                "not_run": f"by calculation its maps and one layer's scores take {needs / 1e9:.1f} GB",
            }
        if subject == "transformer_lens" and find_spec("transformer_lens") is None:
            return {"not_run": "transformer-lens is not installed"}
    if subject == "headwater" and find_spec("numba") is None:
        return {"not_run": "the extra fast (numba) is not installed"}
    # of the bare pass more than one, so that its spread tells whether the machine was idle
    repeats = args.repeats if length <= 4096 or subject == "sdpa" else 1
    return time_and_memory(SETUP + RUN[subject] + MEASURE, length, repeats=repeats, threads=args.threads)


def compare(length: int, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars this benchmark is held to, each with what was reached; those against dense maps are for 4096 on."""
    bars: list[dict[str, Any]] = []

    def bar(text: str, value: float, holds: bool) -> None:
        bars.append({"length": length, "bar": text, "reached": round(value, 2), "holds": holds})

    base = rows["sdpa"]
    for name in OURS:
        ours = rows[name]
        if "not_run" in ours or "not_run" in base:
            bar(f"{name} runs", 0.0, False)
            continue
        most = 1.7 if length <= 4096 else 2.0
        for kind in ("wall_s", "cpu_s"):
            bar(f"{name} {kind}: at most {most} × sdpa", x := ours[kind] / base[kind], x <= most)
        bar(
            f"{name} extra memory: at most 1.2 × sdpa",
            x := ours["extra_mb"] / max(base["extra_mb"], 1.0),
            x <= 1.2,
        )
    ours = rows["headwater" if "not_run" not in rows["headwater"] else "headwater_torch"]
    if "not_run" in ours:
        return bars
    for name in DENSE if length >= 4096 else ():
        peer = rows[name]
        if "not_run" not in peer:
            for kind in ("wall_s", "cpu_s"):
                bar(f"{kind}: at least 5 × faster than {name}", x := peer[kind] / ours[kind], x >= 5)
        memory = peer.get("extra_mb", peer.get("computed_mb"))
        if memory is not None:
            bar(f"extra memory: at least 20 × less than {name}", x := memory / ours["extra_mb"], x >= 20)
    if length > 4096:
        bar("peak memory in GB: under 4", x := ours["peak_mb"] / 1e3, x < 4)
    return bars


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=3, help="of lengths up to 4096; longer ones run once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dense-up-to", type=int, default=4096, help="longest prompt whose maps are made")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()

    red = in_a_process(SETUP + CHECK, 300, 1, args.threads, threads=args.threads)
    if "not_run" in red:
        sys.exit(f"nothing is measured: the statistics are wrong ({red['not_run']})")
    report = head((__doc__ or "").split("\n")[0], args.threads) | {"rows": [], "bars": []}
    for length in args.lengths:
        rows = {}
        for subject in SUBJECTS:
            found = rows[subject] = measure(subject, length, args)
            report["rows"].append({"length": length, "subject": subject} | found)
            if "not_run" in found:
                print(f"{length:>7} {subject:<17} not run: {found['not_run']}", flush=True)
                continue
            print(
                f"{length:>7} {subject:<17} {found['wall_s']:8.2f} s wall  {found['cpu_s']:8.2f} s CPU  "
                f"{found['extra_mb']:8.0f} MB extra  {found['peak_mb']:8.0f} MB peak", flush=True,
            )  # fmt: skip
        for row in compare(length, rows):
            report["bars"].append(row)
            print(f"        {'holds' if row['holds'] else 'MISSED':<7} {row['bar']}: {row.get('reached')}")
    bare = [
        row["wall_spread_s"] for row in report["rows"] if row["subject"] == "sdpa" and "not_run" not in row
    ]
    refuse_unsteady(report, *bare)
    write(report, args.json)


if __name__ == "__main__":
    main()
