"""Activation patching of one pair of prompts, beside TransformerLens' `patching` on a bridge of the same weights.

`python benchmarks/patching.py [--layers 12] [--tokens 15] [--differ 10 0] [--rounds 3] [--what head …] [--json FILE]`;
results go to benchmarks/results/patching.json. A random model of GPT-2's size (width 768, 12 heads, vocabulary 50,257);
clean and corrupt prompts differ in one token, at two thirds of their length and then at their first (or where
`--differ` says): Headwater runs no position before it, so this decides how much is saved, and 0 shows what is left when
nothing is. Every head's z at all positions, and the stream and the MLP's output at every position, are restored in the
corrupt run, each on its own. Both sides get the tokens and give the measure (a logit difference at the last token) of
every cell, their own plain runs and caches included; gradients are off, and each has all threads. An effect that
differs by more than 1e-3 ends the run with nothing written. Subjects take turns; seconds are wall-clock, figures are
medians with their spread, the load stands in the file.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for every sweep of either side would hide the figures

import numpy as np
import torch
import transformers as hf
from cpu_report import head, refuse_unsteady, write

import headwater as hw
from headwater import analyses

SWEEPS = {
    "head": "attn_head_out_all_pos", "residual": "resid_pre", "mlp": "mlp_out", "head_position": "attn_head_out_by_pos",
}  # fmt: skip
ANSWER, WRONG = 11, 20
RESULTS = Path(__file__).parent / "results" / "patching.json"


def subjects(layers: int) -> tuple[hw.HookedModel, Any]:
    """The model, and a bridge on a copy of it."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    torch.manual_seed(0)
    plain = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=layers, initializer_range=0.05)).eval()
    twin = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how a bridge computes is not the matter here
        return hw.load(plain), build_bridge_from_module(twin, "GPT2LMHeadModel", hf_config=twin.config)


def prompts(tokens: int, differ: int) -> tuple[torch.Tensor, torch.Tensor]:
    clean = torch.randint(100, 50_000, (1, tokens), generator=torch.Generator().manual_seed(1))
    corrupt = clean.clone()
    corrupt[0, differ] += 1
    return clean, corrupt


def theirs(bridge: Any, clean: torch.Tensor, corrupt: torch.Tensor, sweep: str) -> np.ndarray:
    from transformer_lens import patching

    def measure(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, ANSWER] - logits[0, -1, WRONG]

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends, cache = bridge.run_with_cache(clean)
        begin, end = measure(bridge(corrupt)), measure(ends)
        found = getattr(patching, f"get_act_patch_{sweep}")(bridge, corrupt, cache, measure)
    return ((found - begin) / (end - begin)).numpy()


def ours(model: hw.HookedModel, clean: torch.Tensor, corrupt: torch.Tensor, what: Any) -> np.ndarray:
    found = analyses.patch(model, clean, corrupt, what=what, answer=f"#{ANSWER}", wrong=f"#{WRONG}")
    values = found.values[0]
    return values.swapaxes(1, 2) if what == "head_position" else values


def timed(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def measured(
    model: Any, bridge: Any, clean: torch.Tensor, corrupt: torch.Tensor, what: str, rounds: int
) -> dict[str, Any]:
    ours(model, clean, corrupt, what)  # what happens once per model does not count
    seconds: dict[str, list[float]] = {"headwater": [], "transformer_lens": []}
    mine = np.empty(0)
    for _ in range(rounds):
        took, mine = timed(lambda: ours(model, clean, corrupt, what))
        seconds["headwater"].append(took)
        took, other = timed(lambda: theirs(bridge, clean, corrupt, SWEEPS[what]))
        seconds["transformer_lens"].append(took)
        if not np.allclose(mine, other, atol=1e-3):
            raise SystemExit(f"{what}: effects differ by {np.abs(mine - other).max():.2e}")
    middle = {name: statistics.median(given) for name, given in seconds.items()}
    ratio = middle["transformer_lens"] / middle["headwater"]
    print(
        f"{what}, {mine.size} cells: {middle['headwater']:.2f} s, {middle['transformer_lens']:.2f} s, ×{ratio:.1f}"
    )
    return {"what": what, "cells": mine.size, "seconds": seconds, "ratio_of_medians": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=15)
    parser.add_argument(
        "--differ",
        type=int,
        nargs="+",
        help="positions of the token that differs (default: two thirds, and 0)",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--what", nargs="+", default=["head", "residual", "mlp"], choices=list(SWEEPS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS)
    asked = parser.parse_args()
    places = [2 * asked.tokens // 3, 0] if asked.differ is None else asked.differ
    if not all(0 <= place < asked.tokens for place in places):
        sys.exit(f"--differ: give positions from 0 to {asked.tokens - 1}")

    torch.set_num_threads(asked.threads)
    report = head((__doc__ or "").splitlines()[0], asked.threads)
    model, bridge = subjects(asked.layers)
    rows = [
        {"differ": place} | measured(model, bridge, *prompts(asked.tokens, place), what, asked.rounds)
        for place in places
        for what in asked.what
    ]
    refuse_unsteady(report)
    write(report | {"layers": asked.layers, "tokens": asked.tokens, "rows": rows}, asked.json)


if __name__ == "__main__":
    main()
