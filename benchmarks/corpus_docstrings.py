"""Write a corpus of English technical prose that every installation of Headwater holds: the docstrings of NumPy, SciPy,
pandas and NetworkX (all BSD-3-Clause), as JSON lines of at least 2,800 characters each.

    python benchmarks/corpus_docstrings.py texts.jsonl 2000
    python benchmarks/corpus_docstrings.py time texts.jsonl FOLDER

The second runs `headwater corpus` of smollm2-135m over them, two shards beside each other with one thread in each, and
merges these in FOLDER; kept are the small result and what it took (benchmarks/results/corpus_docstrings.*). Stopped, it
goes on from the shards in FOLDER, and tells the time of the texts that were left. `page FILE` prints the table of
docs/corpora.md from a result, and what was kept of the time.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "corpus_docstrings.safetensors"
HEADWATER = [sys.executable, "-m", "headwater", "corpus"]
LENGTH, SHARDS = 512, 2
PACKAGES = ("numpy", "scipy", "pandas", "networkx")
SHOWN = (
    "first",
    "self",
    "previous",
    "duplicate",
    "induction",
    "free_previous",
    "free_induction",
    "aside",
    "received",
)
CHARACTERS = 2_800  # more than 512 tokens
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a file, in their order, those of tests left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield inspect.cleandoc(text)


def texts() -> Iterator[dict[str, str]]:
    """Docstrings of each file put together until they are long enough."""
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            if "tests" in path.parts:
                continue
            together = ""
            for text in docstrings(path):
                together = f"{together}\n\n{text}".strip()
                if len(together) >= CHARACTERS:
                    yield {"text": together, "from": f"{package}/{path.relative_to(root).as_posix()}"}
                    together = ""


def page(path: str) -> str:
    """The strongest heads of some statistics as a table: means, middle and highest decile, the best example."""
    from headwater.analyses._corpora.result import Corpus

    found = Corpus.open(path)
    told = found.state.told
    lines = [
        f"{told['texts']} texts, {told['tokens']:,} tokens, {len(found.layers)} layers × {found.heads} heads", "",
        "| statistic | heads | mean | median | highest decile | its strongest example |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in SHOWN:
        layer, head = found.find(name, 1).index[0]
        middle, high = (float(found.deciles(name).sel(layer=layer, head=head, decile=d)) for d in (0.5, 0.9))
        names = ", ".join(f"{at[0]}.{at[1]}" for at in found.find(name, 3).index)
        best = found.examples(layer, head, name)[0]
        ends = " → ".join(_code(best.tokens[at]) for at in (best.query, best.key))
        mean = float(found.mean(name).sel(layer=layer, head=head))
        lines.append(
            f"| {name} | {names} | {mean:.3f} | {middle:.3f} | {high:.3f} | {ends} ({best.value:.3f}) |"
        )
    return "\n".join(lines)


def _code(token: str) -> str:
    """A token as code in Markdown, also where it holds a backtick."""
    shown = token.strip() or "␣"
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`"


def timed(texts: str, folder: str) -> None:
    """Run the shards beside each other, merge them, and keep the small result and what each shard took."""
    root = Path(folder)
    root.mkdir(exist_ok=True)
    parts = [root / f"{n}.safetensors" for n in range(1, SHARDS + 1)]
    before = [_read(part) for part in parts]
    about = _machine()
    begun = time.monotonic()
    asked = [*HEADWATER, texts, "-m", "smollm2-135m", "--length", str(LENGTH)]
    started = {
        subprocess.Popen(
            [*asked, "--shard", f"{n + 1}/{SHARDS}", "--out", part],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ).pid: n
        for n, part in enumerate(parts)
    }
    shards: dict[int, dict[str, float]] = {}
    while started:
        pid, status, used = os.wait4(-1, 0)
        n = started.pop(pid)
        if status:
            for other in started:
                os.kill(other, signal.SIGINT)  # it saves what it has
            raise SystemExit(f"shard {n + 1} ended with {os.waitstatus_to_exitcode(status)}; run this again")
        shards[n] = {
            "texts": _read(parts[n]) - before[n], "wall_s": round(time.monotonic() - begun, 1),
            "cpu_s": round(used.ru_utime + used.ru_stime, 1), "peak_mib": used.ru_maxrss // 1024,
        }  # fmt: skip
    whole = root / "whole.safetensors"
    small = ["--small", "--tokens", "5", "--examples", "1", "--out", RESULT]
    for command in (["merge", *parts, "--out", whole], [whole, *small]):
        subprocess.run([*HEADWATER, *command], check=True, stdout=subprocess.DEVNULL)
    found = {**about, "texts": _read(whole), "length": LENGTH, "shards": [shards[n] for n in range(SHARDS)]}
    RESULT.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


def took(told: dict[str, Any]) -> str:
    """What a run took, in words."""
    shards = told["shards"]
    texts, wall = sum(each["texts"] for each in shards), max(each["wall_s"] for each in shards)
    seconds = sum(each["cpu_s"] for each in shards) / texts
    return (
        f"{texts:,} texts took {wall / 60:.0f} minutes, by {len(shards)} shards beside each other, each with one "
        f"thread, on {told['processors']} processors ({told['machine']}, {told['capability']}; load "
        f"{told['load']} before): {seconds:.1f} seconds of processor time for a text, the opening of the "
        f"model included, and {max(each['peak_mib'] for each in shards):,} MiB of memory for a shard."
    )


def _read(path: Path) -> int:
    """The texts that a result holds."""
    from headwater.analyses._corpora.result import Corpus

    return Corpus.open(path).state.told["texts"] if path.exists() else 0


def _machine() -> dict[str, Any]:
    """Where and when, and how busy the machine was when the run began."""
    import torch

    return {
        "date": datetime.now(UTC).date().isoformat(), "processors": os.cpu_count(), "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main(target: str, count: str) -> None:
    """Texts in an order drawn by their digests, so that the packages are mixed."""
    found = {hashlib.sha256(each["text"].encode()).hexdigest(): each for each in texts()}
    chosen = [found[digest] for digest in sorted(found)[: int(count)]]
    lines = "".join(json.dumps(each) + "\n" for each in chosen)
    Path(target).write_text(lines, encoding="utf-8")
    print(f"{len(chosen)} of {len(found)} texts, {len(lines):,} bytes")


if __name__ == "__main__":
    match sys.argv[1:]:
        case "page", result:
            print(page(result), took(json.loads(RESULT.with_suffix(".json").read_text())), sep="\n\n")
        case "time", given, folder:
            timed(given, folder)
        case target, count:
            main(target, count)
        case _:
            raise SystemExit(__doc__)
