"""Time and memory of a forward pass when heads are gone from the weights (`headwater.remove_heads`), by their share.

`python benchmarks/pruning.py` (results go to benchmarks/results/pruning.json). The model is of GPT-2's size with random
weights (12 layers × 12 heads, width 768, float32) and without a language head, which pruning does not touch; which
heads go is drawn once, and shares contain each other. Michel, Levy & Neubig 2019 report for BERT with half of its heads
gone +1.9, 2.7, 17.5 and 17.5 % speed at batches of 1, 4, 16 and 64, on a GPU.

First each smaller model is held to the whole one with the same heads silenced; if one differs nothing is measured or
written. Then the whole model and the smaller ones take turns in one process, after a round that does not count; figures
are medians with their spread. Memory is of the weights, and what one pass of the largest batch takes above the loaded
model, each model in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from cpu_report import head, in_a_process, refuse_unsteady, write

import headwater as hw

LAYERS, HEADS, WIDTH, VOCAB = 12, 12, 768, 1000
RESULTS = Path(__file__).parent / "results" / "pruning.json"
IN_A_PROCESS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from pruning import smaller, whole
batch, tokens, threads, *gone = map(int, sys.argv[1:])
torch.set_num_threads(threads)
model = smaller(whole(), gone)
def run():
    with torch.no_grad(): model(torch.arange(tokens).expand(batch, -1), use_cache=False)
measured(run, 1)
"""


def whole() -> hw.HookedModel:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, bos_token_id=0, eos_token_id=0
    )
    return hw.load(hf.GPT2Model(config).eval())


def gone_at(share: float) -> list[int]:
    """The heads that are gone, counted through the layers."""
    order = np.random.default_rng(0).permutation(LAYERS * HEADS)
    return order[: round(share * len(order))].tolist()


def smaller(model: hw.HookedModel, gone: list[int]) -> Any:
    return hw.remove_heads(model, [f"{n // HEADS}.{n % HEADS}" for n in gone])


def difference(model: hw.HookedModel, pruned: Any, gone: list[int]) -> float:
    """The largest of two texts' last hidden states from those of the whole model without these heads' outputs."""
    gates = torch.ones(1, LAYERS, HEADS)
    gates.view(-1)[gone] = 0
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad(), model.gated(gates):
        return float((pruned(ids).last_hidden_state - model.embeddings(ids)).abs().max())


def seconds(models: dict[float, Any], batch: int, tokens: int, rounds: int) -> dict[float, list[list[float]]]:
    """Wall and CPU time of each pass, by share: the models take turns."""
    ids = torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(1))
    found: dict[float, list[list[float]]] = {share: [] for share in models}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for share, model in models.items():
                used, start = time.process_time(), time.perf_counter()
                model(ids, use_cache=False)
                found[share].append([time.perf_counter() - start, time.process_time() - used])
    return {share: passes[1:] for share, passes in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="of heads removed")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not all(0 < share <= 1 for share in args.shares):
        sys.exit("--shares: give fractions above 0 and up to 1; the whole model is always measured")

    torch.set_num_threads(args.threads)
    model, report = whole(), head((__doc__ or "").split("\n")[0], args.threads)
    gone = {share: gone_at(share) for share in (0.0, *sorted(set(args.shares)))}
    models = {share: smaller(model, heads) for share, heads in gone.items()}
    for share, pruned in models.items():
        error = difference(model, pruned, gone[share])
        if error > 1e-3:
            sys.exit(
                f"nothing is measured: without {share:.0%} of the heads hidden states differ by {error:.1e}"
            )
    report |= {"tokens": args.tokens, "rounds": args.rounds, "memory": [], "rows": []}
    for share, pruned in models.items():
        sizes = max(args.batches), args.tokens, args.threads
        used = in_a_process(IN_A_PROCESS, *sizes, *gone[share], threads=args.threads)
        weights = sum(p.numel() * p.element_size() for p in pruned.parameters()) / 1e6
        taken = {name: used[name] for name in ("extra_mb", "not_run") if name in used}
        report["memory"].append({"removed": share, "batch": sizes[0], "weights_mb": weights} | taken)
        print(
            f"{share:4.0%} removed: {weights:.0f} MB of weights, a pass of {sizes[0]} texts takes {taken}",
            flush=True,
        )
    for batch in args.batches:
        passes = seconds(models, batch, args.tokens, args.rounds)
        middle = {
            share: [statistics.median(x) for x in zip(*given, strict=True)] for share, given in passes.items()
        }
        for share, given in passes.items():
            wall, cpu = ([x[place] for x in given] for place in (0, 1))
            speed = {"wall_s": middle[0.0][0] / middle[share][0], "cpu_s": middle[0.0][1] / middle[share][1]}
            row = {"batch": batch, "removed": share, "heads_left": LAYERS * HEADS - len(gone[share])}
            row |= {
                "wall_s": middle[share][0],
                "wall_spread_s": [min(wall), max(wall)],
                "cpu_s": middle[share][1],
            }
            report["rows"].append(row | {"cpu_spread_s": [min(cpu), max(cpu)], "times_as_fast": speed})
            print(
                f"batch {batch:>3}, {share:4.0%} removed: {row['wall_s']:6.3f} s wall, {row['cpu_s']:6.3f} s CPU, "
                f"{speed['wall_s']:.2f} × as fast (CPU {speed['cpu_s']:.2f})", flush=True,
            )  # fmt: skip
    refuse_unsteady(report)
    write(report, args.json)


if __name__ == "__main__":
    main()
