"""What a record adds to a short prompt, behind windows and to a generation, and what edits add to a pass, on the CPU.

`python benchmarks/overheads.py` (thirteen minutes; results go to benchmarks/results/overheads.json part by
part). Subjects are taken in turns in one process, and ratios are of medians over the rounds.

- short: 15 tokens through smollm2-135m (30 layers). The bare pass is that of transformers with fused attention and the
  logits of the last token; the record is `model.record(x, keep=())`, every default statistic, which needs no logits.
  The bare pass without its head stands beside them.
- windows: 4,096 tokens through the model of record_cpu.py with a window of 512 (Mistral). The bare pass is that of
  transformers with fused attention, whose mask is dense then; pass and record are Headwater's.
- edits: 4,096 tokens through the model of record_cpu.py. The unedited pass is Headwater's own; the edits act on half of
  the heads: 4 sink keys redistributed, 4 keys knocked out, 4 keys biased.
- decoding: 512 new tokens of smollm2-135m, with `record=True` and without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_report import head, refuse_unsteady
from record_cpu import HEADS, KV_HEADS, LAYERS, VOCAB, WIDTH

RESULTS = Path(__file__).parent / "results" / "overheads.json"
MODEL = "smollm2-135m"
TEXT = "Attention that nobody looks at is cheap, and attention that somebody looks at need"
SHORT, LONG, NEW = 15, 4096, 512


def short(report: dict[str, Any], rounds: int) -> None:
    import headwater as hw

    model = hw.load(MODEL)
    bare, ids = _bare(), model.to_tokens(TEXT).ids[:, :SHORT]
    assert ids.shape[1] == SHORT

    def plain() -> None:
        with torch.no_grad():
            for _ in range(10):
                bare(ids, use_cache=False, logits_to_keep=1)

    def headless() -> None:
        with torch.no_grad():
            for _ in range(10):
                bare.model(ids, use_cache=False)

    def record() -> None:
        for _ in range(10):
            model.record(ids, keep=())

    found = _in_turns(
        report, "short", {"bare": plain, "bare without head": headless, "record": record}, rounds
    )
    for name, most in (("bare", 1.15), ("bare without head", 1.25)):
        text = f"record of {SHORT} tokens: at most {most} × the pass {name}"
        _bar(report, text, found["record"] / found[name], most)


def windows(report: dict[str, Any], rounds: int) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    import headwater as hw

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=1376, num_hidden_layers=LAYERS, sliding_window=512,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=65536,
    )  # fmt: skip
    bare = MistralForCausalLM(config).eval()
    bare.set_attn_implementation("sdpa")
    model, ids = hw.load(MistralForCausalLM(config).eval()), torch.randint(0, VOCAB, (1, LONG))

    def plain() -> None:
        with torch.no_grad():
            bare(ids, use_cache=False)

    subjects: dict[str, Callable[[], object]] = {
        "bare": plain,
        "pass": lambda: model(ids),
        "record": lambda: model.record(ids, keep=()),
    }
    found = _in_turns(report, "windows", subjects, rounds)
    for name, most in (("pass", 1.05), ("record", 1.7)):
        _bar(report, f"windows: {name} at most {most} × the bare pass", found[name] / found["bare"], most)


def edits(report: dict[str, Any], rounds: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import headwater as hw

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=1376, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=65536,
    )  # fmt: skip
    model = hw.load(LlamaForCausalLM(config).eval())
    ids = torch.randint(0, VOCAB, (1, LONG))
    half = [f"{layer}.{one}" for layer in range(LAYERS) for one in range(0, HEADS, 2)]
    sinks, others = [0, 1, 2, 3], [1000, 1001, 2000, 3000]
    edited = {
        "redistribute": hw.Redistribute(sinks, keep=0.4, heads=half),
        "redistribute others": hw.Redistribute(others, keep=0.4, heads=half),
        "knockout": hw.Knockout(queries="all", keys=sinks[1:], heads=half),
        "knockout others": hw.Knockout(queries="all", keys=others, heads=half),
        "knockout of one query": hw.Knockout(queries=-1, keys=others, heads=half),
        "bias": hw.BiasKeys(sinks, 1.5, heads=half),
        "bias others": hw.BiasKeys(others, 1.5, heads=half),
    }

    def unedited() -> None:
        model(ids)

    def under(edit: Any) -> Callable[[], None]:
        def run() -> None:
            with model.edit(edit):
                model(ids)

        return run

    subjects = {"unedited": unedited} | {name: under(edit) for name, edit in edited.items()}
    found = _in_turns(report, "edits", subjects, rounds)
    for name in edited:
        most = 1.15 if name.startswith("redistribute") else 1.05
        _bar(report, f"{name}: at most {most} × the unedited pass", found[name] / found["unedited"], most)


def decoding(report: dict[str, Any], rounds: int) -> None:
    import headwater as hw

    model = hw.load(MODEL)
    ids = model.to_tokens(TEXT).ids
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    subjects: dict[str, Callable[[], object]] = {
        "plain": lambda: model.generate(ids, **settings),
        "record": lambda: model.generate(ids, record=True, **settings),
        "record of statistics": lambda: model.generate(ids, record=True, keep=(), **settings),
    }
    found = _in_turns(report, "decoding", subjects, max(rounds // 3, 3))
    for name in ("record", "record of statistics"):
        share = found["plain"] / found[name]
        _bar(report, f"{name}: at least 95 % of the unrecorded tokens per second", share, 0.95, most=False)


def _bare() -> Any:
    import transformers

    from headwater.lens.trained.registry import added_folder

    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(added_folder(MODEL), attn_implementation="sdpa", dtype=torch.float32).eval()


def _in_turns(
    report: dict[str, Any], what: str, subjects: dict[str, Callable[[], object]], rounds: int
) -> dict[str, float]:
    """Median seconds of each subject, all of them taken in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for n in range(rounds + 1):
        for name, run in subjects.items():
            begun = time.perf_counter()
            run()
            if n:  # the first round warms up
                seconds[name].append(time.perf_counter() - begun)
    for name, found in seconds.items():
        report["rows"].append({"what": what, "subject": name, "seconds": found})
        print(
            f"{what:<9} {name:<22} {statistics.median(found):7.3f} s  ({min(found):.3f} to {max(found):.3f})"
        )
    report["bare"].append(seconds[next(iter(subjects))])
    return {name: statistics.median(found) for name, found in seconds.items()}


def _bar(report: dict[str, Any], text: str, value: float, limit: float, most: bool = True) -> None:
    holds = value <= limit if most else value >= limit
    report["bars"].append({"bar": text, "reached": round(value, 3), "holds": holds})
    print(f"    {'holds' if holds else 'MISSED':<7} {text}: {value:.3f}", flush=True)


PARTS = {"short": short, "windows": windows, "edits": edits, "decoding": decoding}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kept = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.what:
        report = head((__doc__ or "").split("\n")[0], args.threads) | {"rows": [], "bars": [], "bare": []}
        PARTS[name](report, args.rounds)
        refuse_unsteady(report, *report.pop("bare"))
        report["machine"]["load_after"] = os.getloadavg()[0]
        kept[name] = report
        args.json.write_text(json.dumps(kept, indent=1) + "\n")
        print(f"{name} written to {args.json}", flush=True)


if __name__ == "__main__":
    main()
