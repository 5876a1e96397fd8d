"""Time of a run when image tokens are removed behind a layer (`hw.PruneTokens`), as a ratio to the whole run.

`python benchmarks/pruned_tokens.py` (results go to benchmarks/results/pruned_tokens.json). Subjects: a tower of DINOv2
small's size (12 layers, width 384, patches of 14 pixels) at several sizes of the picture, and the prefill of a language
model (12 layers, width 512) behind image tokens, as in a model of LLaVA's type. Weights are random: what is computed
does not depend on them. FlowCut's abstract reports a 3.2 times faster prefill of LLaVA-NeXT-7B, on a GPU.

First each shortened run is held to the run that hides the same tokens; if one differs nothing is measured or written.
Then the whole run and the shortened ones take turns in one process, after a round that does not count. Ratios are whole
over shortened, of CPU time and of wall time, medians of the turns with the spread of the first; scoring tokens is in
them. On a busy machine CPU time is the one to read.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from cpu_report import head, refuse_unsteady, write
from torch import Tensor

import headwater as hw

RESULTS = Path(__file__).parent / "results" / "pruned_tokens.json"
SHARES = (0.5, 0.25, 0.11)
PIXELS = (224, 518)
IMAGE_TOKENS, WORDS = (256, 1024), 32


def tower(pixels: int) -> tuple[hw.HookedModel, tuple[Any, ...], Any]:
    """A DINOv2 small, its input, and which of its tokens may go."""
    torch.manual_seed(0)
    config = hf.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=pixels, patch_size=14
    )
    return hw.load(hf.Dinov2Model(config).eval()), (torch.randn(1, 3, pixels, pixels),), "image"


def language(count: int) -> tuple[hw.HookedModel, tuple[Any, ...], Any]:
    """A Llama behind `count` image tokens and some words."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    ids = torch.arange(count + WORDS).remainder(1000)[None]
    return hw.load(hf.LlamaModel(config).eval()), (ids,), slice(1, count + 1)


def edit_at(share: float, positions: Any) -> hw.PruneTokens:
    """Tokens go behind the third layer, by the attention of what reads them."""
    return hw.PruneTokens({2: share}, "attention", positions)


@torch.no_grad()
def states(model: hw.HookedModel, given: tuple[Any, ...]) -> Tensor:
    return model.hf(*given).last_hidden_state


def hold(model: hw.HookedModel, given: tuple[Any, ...], edit: hw.PruneTokens) -> None:
    """Refuse to measure where the kept tokens are not those of a run that hides the others."""
    with model.edit(edit):
        found = states(model, given)
    gone = found[0].isnan().any(-1).nonzero()[:, 0].tolist()
    with model.edit(hw.Knockout("all", gone, layers=model.layers[3:])):
        expected = states(model, given)
    kept = ~found.isnan().any(-1)
    off = float((found - expected)[kept].abs().max() / expected.abs().max())
    if not off < 1e-3:
        sys.exit(f"{edit}: the kept tokens differ by {off:.2g}; nothing was measured")


def measured(
    model: hw.HookedModel, given: tuple[Any, ...], positions: Any, turns: int
) -> list[dict[str, Any]]:
    edits = [edit_at(share, positions) for share in SHARES]
    for edit in edits:
        hold(model, given, edit)
    taken: list[list[tuple[float, float]]] = [[] for _ in range(len(edits) + 1)]
    for turn in range(turns + 1):
        for n, edit in enumerate([None, *edits]):
            with model.edit(*([] if edit is None else [edit])):
                begun = time.process_time(), time.perf_counter()
                states(model, given)
                seconds = time.process_time() - begun[0], time.perf_counter() - begun[1]
            if turn:
                taken[n].append(seconds)
    rows = []
    for share, short in zip(SHARES, taken[1:], strict=True):
        cpu, wall = ([w[k] / s[k] for w, s in zip(taken[0], short, strict=True)] for k in (0, 1))
        milliseconds = [round(1000 * statistics.median(x[0] for x in of), 1) for of in (taken[0], short)]
        rows.append(
            {
                "kept": share, "times_as_fast": round(statistics.median(cpu), 2),
                "spread": [round(min(cpu), 2), round(max(cpu), 2)],
                "times_as_fast_wall": round(statistics.median(wall), 2), "cpu_ms": milliseconds,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = head("time of runs whose image tokens are removed behind the third layer", args.threads)
    report |= {"turns": args.turns, "rows": []}
    subjects = [(f"tower of DINOv2 small, {n} pixels", tower, n) for n in PIXELS]
    subjects += [(f"language model, {n} image tokens", language, n) for n in IMAGE_TOKENS]
    for name, make, size in subjects:
        for row in measured(*make(size), args.turns):
            report["rows"].append({"subject": name, **row})
            print(
                f"{name}, {row['kept']:.0%} kept: {row['times_as_fast']} × as fast {row['spread']}",
                flush=True,
            )
    refuse_unsteady(report)
    write(report, args.json)


if __name__ == "__main__":
    main()
