"""Opening, recording and patching a trained language model, beside TransformerLens on the same folder.

`headwater models add smollm2-135m`, then `python benchmarks/real_models.py [--what load record patching edges]`;
results go to benchmarks/results/real_models.json. The model is SmolLM2-135M-Instruct (30 layers, 9 heads over 3 key
heads, float32, 538 MB). Each subject runs in a process of its own and they take turns.

- load: `hw.load` and `TransformerBridge.boot_transformers` of one folder, without the import of either; the file is in
  the cache of the system. Headwater also runs the model to see that its outputs are those of transformers.
- record: all default statistics of all heads on real text, with the loops of the extra `fast`, beside the bare pass of
  transformers with fused attention and the logits of the last token (a record needs none) and `run_with_cache` of the
  patterns. Where two times the maps do not fit into the free memory, what they take is computed and not run.
- patching: every one of the 270 heads' z at all positions, restored in a corrupt run, each on its own, for one pair of
  indirect-object prompts. Effects that differ by more than 1e-3 end the run with nothing written.
- edges: attribution patching of every edge between heads and MLPs for 4 pairs. TransformerLens has none.

Memory is the peak above what a process holds before the work that is timed; that of records is measured in a process
of its own, with an allocator that keeps no holes. Seconds are wall-clock, medians with their spread; the load of the
machine stands in the file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cpu_report import head, in_a_process, refuse_unsteady, time_and_memory, write

MODEL = "smollm2-135m"
LAYERS, HEADS = 30, 9
RESULTS = Path(__file__).parent / "results" / "real_models.json"
SETUP = f"""
import os, sys, warnings
os.environ["TQDM_DISABLE"] = "1"
import torch
import transformers
import transformer_lens
from transformer_lens.model_bridge import TransformerBridge
import headwater as hw
from headwater import analyses
from headwater.lens.trained.registry import added_folder
warnings.simplefilter("ignore")  # how a bridge computes is not the matter here
transformers.utils.logging.disable_progress_bar()
size, repeats, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
FOLDER = str(added_folder({MODEL!r}))
def bridge(): return TransformerBridge.boot_transformers(FOLDER, device="cpu")
"""
LOAD = {
    "headwater": f"hw.load; measured(lambda: hw.load({MODEL!r}), repeats)",
    "transformer_lens": "measured(bridge, repeats)",
}
TEXT = """
import pydoc_data.topics
tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
text = "\\n\\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
ids = torch.tensor([tokenizer(text[: 8 * size])["input_ids"][:size]])
assert ids.shape[1] == size
"""
RECORD = {
    "sdpa": """
hf = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="sdpa", dtype=torch.float32).eval()
def run(x):
    with torch.no_grad(): hf(x, use_cache=False, logits_to_keep=1)
""",
    "headwater": f"model = hw.load({MODEL!r})\ndef run(x): return model.record(x, keep=())\n",
    "transformer_lens": """
bridged = bridge()
def run(x):
    with torch.no_grad(): bridged.run_with_cache(x, names_filter=lambda name: name.endswith("hook_pattern"))
""",
}
PAIRS = f"""
model = hw.load({MODEL!r})
pairs = hw.prompt_set("indirect_object", n=4, model=model)
pair = pairs[0]
right, wrong = (int(model.to_tokens(word).ids[0, 0]) for word in (pair.answer, pair.wrong[0]))
ids = [model.to_tokens(text).ids for text in (pair.prompt, pair.corrupt)]
def ours(): return torch.tensor(analyses.patch(model, pair.prompt, pair.corrupt, what="head", answer=pair.answer,
    wrong=pair.wrong[0]).values[0])
"""
THEIRS = """
from transformer_lens import patching
bridged = bridge()
def measure(logits): return logits[0, -1, right] - logits[0, -1, wrong]
def theirs():
    with torch.no_grad():
        ends, cache = bridged.run_with_cache(ids[0], names_filter=lambda name: name.endswith("hook_z"))
        begin, end = measure(bridged(ids[1])), measure(ends)
        found = patching.get_act_patch_attn_head_out_all_pos(bridged, ids[1], cache, measure)
    return (found - begin) / (end - begin)
"""
PATCHING = {
    "headwater": PAIRS + "ours(); measured(ours, repeats)",
    "transformer_lens": PAIRS + THEIRS + "measured(theirs, repeats)",
    "largest_difference": PAIRS
    + THEIRS
    + """
worst = (ours() - theirs()).abs().max().item()
assert worst < 1e-3, f"effects differ by {worst:.1e}"
measured(lambda: None, 1)
""",
}
EDGES = {
    "headwater": PAIRS
    + """
def run(): return analyses.edge_attribution(model, [each.prompt for each in pairs], [each.corrupt for each in pairs],
    answer=[each.answer for each in pairs], wrong=[each.wrong[0] for each in pairs])
measured(run, repeats)
"""
}


def loads(report: dict[str, Any], asked: argparse.Namespace) -> None:
    found = {name: _run(report, "load", name, SETUP + code, 0, asked) for name, code in LOAD.items()}
    _bar(report, "load: at most 5 s", found["headwater"]["wall_s"], 5, most=True)


def records(report: dict[str, Any], asked: argparse.Namespace) -> None:
    import psutil

    for length in asked.lengths:
        rows = {}
        for name, code in RECORD.items():
            needs = (
                4 * HEADS * length**2 * (LAYERS + 1)
            )  # float32 maps of all layers, one layer's scores beside
            if name == "transformer_lens" and 2 * needs > psutil.virtual_memory().available:
                why = f"by calculation its maps and one layer's scores take {needs / 1e9:.1f} GB"
                rows[name] = {"computed_mb": needs / 1e6, "not_run": why}
                _tell(report, "record", name, length, rows[name])
                continue
            # long enough that the loops are compiled before the clock starts
            code = SETUP + TEXT + code + "run(ids[:, :512]); measured(lambda: run(ids), repeats)"
            found = time_and_memory(code, length, repeats=asked.repeats, threads=asked.threads)
            rows[name] = _kept(report, "record", name, length, found)
        ours, bare, peer = rows["headwater"], rows["sdpa"], rows["transformer_lens"]
        where = f"record of {length} tokens"
        _bar(
            report,
            f"{where}: at most 2 × the bare pass",
            ours["wall_s"] / bare["wall_s"],
            2,
            most=True,
        )
        memory = peer.get("extra_mb", peer.get("computed_mb"))
        if memory is not None:
            how = "computed" if "not_run" in peer else "measured"
            _bar(
                report, f"{where}: at least 20 × less memory than dense maps ({how})",
                memory / ours["extra_mb"], 20,
            )  # fmt: skip


def patchings(report: dict[str, Any], asked: argparse.Namespace) -> None:
    alike = in_a_process(SETUP + PATCHING["largest_difference"], 0, 1, asked.threads, threads=asked.threads)
    if "not_run" in alike:
        sys.exit(f"nothing is written: patching is wrong ({alike['not_run']})")
    found = {
        name: _run(report, "patching of 270 heads", name, SETUP + PATCHING[name], 0, asked)
        for name in ("headwater", "transformer_lens")
    }
    ratio = found["transformer_lens"]["wall_s"] / found["headwater"]["wall_s"]
    _bar(report, "patching of 270 heads: at least 10 × faster", ratio, 10)


def edges(report: dict[str, Any], asked: argparse.Namespace) -> None:
    found = _run(report, "edges of 4 pairs", "headwater", SETUP + EDGES["headwater"], 0, asked)
    _bar(report, "edges of 4 pairs: at most 20 s", found["wall_s"], 20, most=True)


def _run(
    report: dict[str, Any], what: str, subject: str, code: str, size: int, asked: argparse.Namespace
) -> dict[str, Any]:
    found = in_a_process(code, size, asked.repeats, asked.threads, threads=asked.threads)
    return _kept(report, what, subject, size, found)


def _kept(
    report: dict[str, Any], what: str, subject: str, size: int, found: dict[str, Any]
) -> dict[str, Any]:
    """The figures, which are in the report now; a subject that failed ends the benchmark."""
    _tell(report, what, subject, size, found)
    if "not_run" in found and "computed_mb" not in found:
        sys.exit(f"nothing is written: {what} with {subject} did not run ({found['not_run']})")
    return found


def _tell(report: dict[str, Any], what: str, subject: str, size: int, found: dict[str, Any]) -> None:
    report["rows"].append({"what": what, "tokens": size or None, "subject": subject} | found)
    told = found.get("not_run") or (
        f"{found['wall_s']:8.2f} s wall {found['cpu_s']:8.2f} s CPU {found['extra_mb']:8.0f} MB extra "
        f"{found['peak_mb']:8.0f} MB peak"
    )
    print(f"{what:<22} {size or '':>6} {subject:<17} {told}", flush=True)


def _bar(report: dict[str, Any], text: str, value: float, limit: float, most: bool = False) -> None:
    """A bar this benchmark is held to, and what was reached."""
    holds = value <= limit if most else value >= limit
    report["bars"].append({"bar": text, "reached": round(value, 2), "holds": holds})
    print(f"    {'holds' if holds else 'MISSED':<7} {text}: {value:.2f}", flush=True)


PARTS = {"load": loads, "record": records, "patching": patchings, "edges": edges}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS)
    asked = parser.parse_args()
    report = head((__doc__ or "").split("\n")[0], asked.threads) | {"rows": [], "bars": []}
    for name in asked.what:
        PARTS[name](report, asked)
    refuse_unsteady(report)
    write(report, asked.json)


if __name__ == "__main__":
    main()
