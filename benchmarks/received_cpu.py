"""Time and memory of received attention (column sums of the maps) on the CPU: 12 heads, D=64, causal, float32.

`python benchmarks/received_cpu.py [--lengths 1024 4096]` (two minutes; results go to
benchmarks/results/received_cpu.json). Queries and keys are random: cost does not depend on them. Subjects:

- flash: one pass of torch's fused attention, which gives no sums; ratios are to it.
- statistic: `map.statistic("received")`, blocks of rows in a lean walk.
- transposed: `map.T @ ones`, the fused kernel with queries and keys exchanged.
- backward: dV = P^T dO of the fused kernel's backward pass with dO = 1, after its forward pass.
- eager: the dense map, summed.

Each subject gives the same sums, compared at a short length before anything is measured; if they differ nothing is
measured or written. A subject runs in a process of its own. CPU time is of all threads together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cpu_report import head, in_a_process, refuse_unsteady, write

HEADS, WIDTH = 12, 64
BAR = 1.5  # times one pass of the fused kernel
RESULTS = Path(__file__).parent / "results" / "received_cpu.json"
SETUP = f"""
import sys, torch
length, repeats, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads); torch.manual_seed(0)
from headwater.kernels.attend import attend
from headwater.kernels.tiles.mask import Mask
from headwater.kernels.rules.rule import ScoreRule
fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
q, k, v = (torch.randn(1, {HEADS}, length, {WIDTH}) for _ in range(3))
scale = {WIDTH} ** -0.5
def made(length):
    a, b, c = (x[:, :, :length] for x in (q, k, v))
    with torch.no_grad(): return attend(a, b, c, ScoreRule(scale, Mask(length, length, right=0)))[1]
def backward(length):
    a, b = (x[:, :, :length] for x in (q, k))
    c = torch.zeros_like(a).requires_grad_()
    out, _ = fused(a, b, c, 0.0, True, attn_mask=None, scale=scale)
    return torch.autograd.grad(out, c, torch.ones_like(out))[0][..., 0]
def eager(length):
    scores = q[:, :, :length] @ k[:, :, :length].mT * scale
    scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu_(1), float("-inf"))
    return scores.softmax(-1).sum(-2)
def flash(length):
    with torch.no_grad():
        return fused(*(x[:, :, :length] for x in (q, k, v)), 0.0, True, attn_mask=None, scale=scale)
subjects = {{"flash": lambda: flash(length), "backward": lambda: backward(length), "eager": lambda: eager(length)}}
def prepare(length):
    map = made(length)
    return {{"statistic": lambda: map.statistic("received"),
        "transposed": lambda: (map.T @ torch.ones(length, 1))[..., 0]}}
"""
SUBJECTS = ("flash", "statistic", "transposed", "backward", "eager")
MEASURE = "subjects |= prepare(length)\ncall = subjects[{name!r}]\ncall()\nmeasured(call, repeats)\n"
CHECK = """
exact = eager(length).double()
for name, call in (subjects | prepare(length)).items():
    if name != "flash":
        error = (call() - exact).abs().max().item()
        assert error < 1e-3, f"{name} differs from the dense map's sums by {error:.1e}"
measured(lambda: None, 1)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()

    red = in_a_process(SETUP + CHECK, 300, 1, args.threads, threads=args.threads)
    if "not_run" in red:
        sys.exit(f"nothing is measured: the sums are wrong ({red['not_run']})")
    report = head((__doc__ or "").split("\n")[0], args.threads) | {"rows": [], "bars": []}
    for length in args.lengths:
        base = None
        for name in SUBJECTS:
            code = SETUP + MEASURE.format(name=name)
            found = in_a_process(code, length, args.repeats, args.threads, threads=args.threads)
            report["rows"].append({"length": length, "subject": name} | found)
            if "not_run" in found:
                print(f"{length:>7} {name:<11} not run: {found['not_run']}", flush=True)
                continue
            base = found if name == "flash" else base
            line = f"{length:>7} {name:<11} {found['wall_s']:7.3f} s wall  {found['cpu_min_s']:7.3f} s CPU (least)"
            if base is not None and name != "flash":
                ratio = {kind: found[kind] / base[kind] for kind in ("wall_s", "cpu_min_s")}
                report["rows"][-1]["times_flash"] = ratio
                line += f"  {ratio['wall_s']:5.2f} × flash (CPU {ratio['cpu_min_s']:.2f})"
                if name in ("statistic", "transposed"):
                    report["bars"].append(
                        {"length": length, "bar": f"{name}: at most {BAR} × one fused pass", "reached": ratio}
                    )
            print(f"{line}  {found['extra_mb']:7.0f} MB extra", flush=True)
    refuse_unsteady(report)
    write(report, args.json)


if __name__ == "__main__":
    main()
