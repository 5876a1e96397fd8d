"""How a record fares beside neighbours that keep every core busy, against the bare pass beside the same neighbours.

`python benchmarks/busy.py` (results go to benchmarks/results/busy.json). The model is that of record_cpu.py. Neighbours
are processes of their own that multiply matrices, one for each core. Rounds are taken in turns: bare pass and record
on the idle machine, then both beside the neighbours. A factor is busy wall time over idle wall time, by medians; the
bar is the record's factor against the bare pass's. The idle machine has to be idle: a run in which the bare pass
itself varied by more than a fifth is not reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cpu_report import head, refuse_unsteady, write
from record_cpu import HEADS, KV_HEADS, LAYERS, VOCAB, WIDTH

RESULTS = Path(__file__).parent / "results" / "busy.json"
NEIGHBOUR = "import torch; torch.set_num_threads(1); a = torch.randn(1024, 1024)\nwhile True: a @ a"
MOST = 1.5  # times the factor of the bare pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--neighbours", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()

    from transformers import LlamaConfig, LlamaForCausalLM

    import headwater as hw

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=1376, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=65536,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).eval()
    model = hw.load(LlamaForCausalLM(config).eval())
    ids = torch.randint(0, VOCAB, (1, args.length))

    def bare() -> None:
        with torch.no_grad():
            plain(ids, use_cache=False)

    def record() -> None:
        model.record(ids, keep=())

    report = head((__doc__ or "").split("\n")[0], args.threads)
    bare()
    record()
    seconds: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for when, neighbours in (("idle", 0), ("busy", args.neighbours)):
            with _neighbours(neighbours):
                for name, run in (("bare", bare), ("record", record)):
                    begun = time.perf_counter()
                    run()
                    seconds.setdefault(f"{name} {when}", []).append(time.perf_counter() - begun)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    factors = {name: middle[f"{name} busy"] / middle[f"{name} idle"] for name in ("bare", "record")}
    ratio = factors["record"] / factors["bare"]
    report |= {"length": args.length, "neighbours": args.neighbours, "seconds": seconds, "factors": factors}
    report["bars"] = [
        {
            "bar": f"the record's factor: at most {MOST} × the bare pass's",
            "reached": ratio,
            "holds": ratio <= MOST,
        }
    ]
    for name, values in seconds.items():
        print(f"{name:<12} {statistics.median(values):6.2f} s  ({min(values):.2f} to {max(values):.2f})")
    print(
        f"beside {args.neighbours} neighbours the bare pass takes {factors['bare']:.2f} times as long and the record "
        f"{factors['record']:.2f} times: {ratio:.2f} × its factor (at most {MOST})"
    )
    refuse_unsteady(report, seconds["bare idle"])
    write(report, args.json)


@contextmanager
def _neighbours(count: int) -> Iterator[None]:
    """Processes in sessions of their own that multiply matrices for as long as the block runs."""
    command = [sys.executable, "-c", NEIGHBOUR]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        time.sleep(4 if count else 0)  # until they have imported torch
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
