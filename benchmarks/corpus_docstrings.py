"""Write a corpus of English technical prose that every installation of Headwater holds: the docstrings of NumPy, SciPy,
pandas and NetworkX (all BSD-3-Clause), as JSON lines of at least 2,800 characters each.

    python benchmarks/corpus_docstrings.py texts.jsonl 2000
    headwater corpus texts.jsonl -m smollm2-135m --length 512 --shard 1/2 --out a.safetensors &
    headwater corpus texts.jsonl -m smollm2-135m --length 512 --shard 2/2 --out b.safetensors
    headwater corpus merge a.safetensors b.safetensors --out whole.safetensors
    headwater corpus whole.safetensors --small --tokens 5 --examples 1 \\
        --out benchmarks/results/corpus_docstrings.safetensors

with one thread in each (OMP_NUM_THREADS=1). `python benchmarks/corpus_docstrings.py page FILE` prints the table of
docs/corpora.md from a result.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

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


def main(target: str, count: str) -> None:
    """Texts in an order drawn by their digests, so that the packages are mixed."""
    found = {hashlib.sha256(each["text"].encode()).hexdigest(): each for each in texts()}
    chosen = [found[digest] for digest in sorted(found)[: int(count)]]
    lines = "".join(json.dumps(each) + "\n" for each in chosen)
    Path(target).write_text(lines, encoding="utf-8")
    print(f"{len(chosen)} of {len(found)} texts, {len(lines):,} bytes")


if __name__ == "__main__":
    print(page(sys.argv[2])) if sys.argv[1] == "page" else main(*sys.argv[1:])
