"""`headwater verify` tells a file as it was written from one that was changed by a single byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sweep_engines import Here, open_once

import headwater as hw

SAVED = Path(__file__).parents[1] / "saved"
FILES = {
    "edited_llama.safetensors": "every tensor has its digest",
    "experiment.results.json": "results of 2 prompts with tasks-4l: the digest agrees",
    "experiment.json": "an experiment with tasks-4l on 2 prompts",
    "circuit.graphml": "a circuit of",
    "circuit.json": "a circuit of",
}


@pytest.mark.parametrize("name", FILES)
def test_files_as_they_were_written(headwater, name: str) -> None:
    run = headwater("verify", SAVED / name)
    assert (run.exit_code, run.stderr) == (0, "")
    assert FILES[name] in run.stdout


def test_a_changed_byte_is_told_and_the_other_files_too(headwater, tmp_path: Path) -> None:
    record, results = (Path(shutil.copy(SAVED / name, tmp_path)) for name in list(FILES)[:2])
    content = bytearray(record.read_bytes())
    content[-3] ^= 1
    record.write_bytes(content)
    results.write_text(results.read_text().replace("1", "2", 1))
    run = headwater(
        "verify", record, results, SAVED / "circuit.json", tmp_path / "absent.json", SAVED / "README.md"
    )
    assert run.exit_code == 2
    first, second, third, fourth = run.stderr.splitlines()
    assert "edited_llama.safetensors" in first
    assert "was changed after it was written" in second
    assert "absent.json" in third
    assert "README.md is none of the files that Headwater saves" in fourth
    assert "circuit of" in run.stdout


def test_sweeps_and_their_runs(headwater, tmp_path: Path, monkeypatch) -> None:
    """Also one of a corpus, whose texts are counted; a file is changed, one lies there without a row."""
    open_once(monkeypatch)
    monkeypatch.setattr(
        "headwater.analyses._sweeps.run_sweep._engine", lambda kind, setup, sweep, workers: Here(setup, {})
    )
    (tmp_path / "texts.txt").write_text("Mary gave John a drink\n\nMary\n\nJohn\n")
    corpus = {"path": "texts.txt", "unit": "paragraph"}
    sweep = {"model": "tasks-4l", "corpus": corpus, "analyses": [{"analysis": "rollout"}]}
    (tmp_path / "s.json").write_text(json.dumps(sweep))
    assert "a sweep of 3 units with tasks-4l" in headwater("verify", tmp_path / "s.json").stdout
    assert headwater("sweep", tmp_path / "s.json").exit_code == 0
    run = hw.SweepRun(tmp_path / "s.run")
    (run.path / "units" / "stray.safetensors").write_text("x")
    told = headwater("verify", run.path)
    assert (told.exit_code, told.stderr) == (0, "")
    assert "0 queued, 3 done, 0 failed: every file has the digest of its row; 1 other files" in told.stdout
    file = run.file(run.table().key[1])
    file.write_bytes(file.read_bytes()[:-1])
    told = headwater("verify", run.path, tmp_path)
    assert (told.exit_code, told.stdout) == (2, "")
    damaged, none = told.stderr.splitlines()
    assert f"1 files are missing or were changed, first {file}" in damaged
    assert "holds no run of a sweep" in none
