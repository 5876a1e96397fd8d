"""The table on the page of corpora is what its script prints from the kept result."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import headwater as hw

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "corpus_docstrings.safetensors"


def test_the_table_is_that_of_the_kept_result() -> None:
    page = runpy.run_path(str(ROOT / "benchmarks" / "corpus_docstrings.py"))["page"]
    assert page(str(KEPT)) in (ROOT / "docs" / "corpora.md").read_text(encoding="utf-8")


def test_the_time_is_that_of_the_kept_run() -> None:
    """Seen to fail with a number changed on the page."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "corpus_docstrings.py"))
    told = script["took"](json.loads(KEPT.with_suffix(".json").read_text(encoding="utf-8")))
    assert told in " ".join((ROOT / "docs" / "corpora.md").read_text(encoding="utf-8").split())


def test_the_kept_result_is_small_and_as_it_was_written() -> None:
    found = hw.Corpus.open(KEPT, verify=True)
    assert KEPT.stat().st_size < 3 * 2**20
    assert found.run["model"] == "smollm2-135m"
    assert found.run["length"] == 512
    assert found.state.told["tokens"] == 512 * found.state.told["texts"]
