"""`headwater verify` tells a file as it was written from one that was changed by a single byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

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
