"""Exact attention flow from one position to every input token, beside networkx's preflow-push on the same graph.

`python benchmarks/flow.py [--layers 12] [--tokens 128] [--every 8] [--json FILE]`. Two random models, one causal and
one that reads both ways (width 768, 12 heads; 12 layers of 128 tokens have 99,072 and 196,608 edges). Headwater: `flow`
from a record to the finished row, maps read and all tokens solved. networkx: `maximum_flow_value` with `preflow_push`
alone, its graph given, for every n-th input token; its total is the mean of these times the number of tokens. A value
that differs by more than 1e-5 ends the run. Subjects take turns; figures are medians with their spread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
import transformers as hf

import headwater as hw
from headwater.analyses.tokens.flow import flow, flow_graph

VOCAB = 97
NEAR = 1e-5  # capacities are rounded to 2⁻³⁰ in Headwater and are float64 in networkx


def model(causal: bool, layers: int, tokens: int) -> hw.HookedModel:
    """A random model; weights are wide enough that attention is far from uniform."""
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.05, "vocab_size": VOCAB}
    if causal:
        return hw.load(
            hf.GPT2LMHeadModel(hf.GPT2Config(**special, n_layer=layers, n_positions=tokens)).eval()
        )
    config = hf.BertConfig(**special, num_hidden_layers=layers, max_position_embeddings=tokens)
    return hw.load(hf.BertForMaskedLM(config).eval())


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def compared(causal: bool, layers: int, tokens: int, every: int, repeats: int) -> dict[str, Any]:
    """Both subjects on one model; refuses to report where they differ."""
    record = model(causal, layers, tokens).record(torch.randint(0, VOCAB, (1, tokens)))
    graph, top = flow_graph(record), (layers, tokens - 1)
    asked = sorted({*range(0, tokens, every), tokens - 1})
    ours, theirs = [], []
    for repeat in range(repeats):
        found, seconds = timed(lambda: flow(record, normalise=False))
        ours.append(seconds)
        for token in asked if repeat == 0 else asked[:: max(len(asked) // 3, 1)]:
            value, seconds = timed(lambda token=token: _networkx(graph, top, token))
            theirs.append(seconds)
            if abs(value - found.values[0, 0, token]) > NEAR:
                raise SystemExit(
                    f"token {token}: networkx {value}, Headwater {found.values[0, 0, token]}: they must agree first"
                )
    total = float(np.mean(theirs)) * tokens
    return {
        "attention": "causal" if causal else "both ways",
        "layers": layers,
        "tokens": tokens,
        "edges": graph.number_of_edges(),
        "headwater_s": statistics.median(ours),
        "headwater_range_s": [min(ours), max(ours)],
        "networkx_per_token_s": statistics.median(theirs),
        "networkx_per_token_range_s": [min(theirs), max(theirs)],
        "networkx_tokens_measured": len(asked),
        "networkx_total_s": total,
        "times_faster": total / statistics.median(ours),
    }


def _networkx(graph: nx.DiGraph, top: tuple[int, int], token: int) -> float:
    return nx.maximum_flow_value(graph, top, (0, token), flow_func=nx.algorithms.flow.preflow_push)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--every", type=int, default=8, help="networkx solves every n-th input token")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for causal in (True, False):
        row = compared(causal, args.layers, args.tokens, args.every, args.repeats)
        rows.append(row)
        print(
            f"{row['attention']:<10} {row['layers']} layers × {row['tokens']} tokens, {row['edges']} edges: "
            f"Headwater {row['headwater_s']:.2f} s for every token; networkx {row['networkx_per_token_s']:.2f} s "
            f"a token, {row['networkx_total_s']:.0f} s in all: {row['times_faster']:.0f} ×", flush=True,
        )  # fmt: skip
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    report = {
        "what": __doc__.split("\n")[0] if __doc__ else "",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": 1,
            "load": os.getloadavg()[
                0
            ],  # of other work too: above the number of cores, times are too long for both
        },
        "versions": {n: version(n) for n in ("headwater", "scipy", "networkx", "torch", "transformers")},
        "commit": done.stdout.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
