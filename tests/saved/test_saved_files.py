"""Files that an earlier version wrote still open, and give the numbers that they gave then.

Seen to fail with a setting of an edit that is no longer read, and with node names of another form.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import headwater as hw
from headwater import analyses
from headwater.lens.experiments.results import numbers_of
from headwater.lens.experiments.run_file import run_file

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "numbers.json").read_text(encoding="utf-8"))
CLEAN = "When Mary and John went to the store , John gave a drink to"
PAIR = (CLEAN, CLEAN.replace("John gave", "Mary gave"))


@pytest.mark.parametrize("name", ["edited_llama", "generated_gptoss"])
def test_records(name: str) -> None:
    record = hw.Record.open(HERE / f"{name}.safetensors", verify=True)
    for statistic, wanted in NUMBERS[name].items():
        values = [record.map(layer).statistic(statistic).nan_to_num().double() for layer in record.layers]
        assert float(sum(x.sum() for x in values)) == pytest.approx(wanted, abs=1e-2)


@pytest.mark.slow
def test_an_experiment_is_verified(tmp_path: Path) -> None:
    for name in ("experiment.json", "experiment.results.json"):
        shutil.copy(HERE / name, tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", "headwater", "experiment", str(tmp_path / "experiment.json")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "verified: 128 values agree" in run.stdout, run.stdout


def test_a_journal_of_files_alone_is_measured_again(tmp_path: Path) -> None:
    for name in ("experiment.json", "experiment.partial.jsonl"):
        shutil.copy(HERE / name, tmp_path)
    told: list[tuple[int, int]] = []
    found = run_file(tmp_path / "experiment.json", None, lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)], "it does not say which configuration its pieces are of"
    earlier = json.loads((HERE / "experiment.partial.jsonl").read_text().splitlines()[1])
    before, after = dict(numbers_of(earlier["result"])), dict(numbers_of(found.results.results[0]))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name] == (
            pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value
        )


@pytest.mark.parametrize("form", ["graphml", "json"])
def test_circuits(form: str) -> None:
    model = hw.load("tasks-4l")
    circuit = analyses.read_circuit(HERE / f"circuit.{form}")
    edges = sorted(f"{u}->{v}" for u, v in circuit.edges)
    assert [edge.replace("mlp ", "mlp.") for edge in NUMBERS["edges"]] == [
        edge.replace("mlp ", "mlp.") for edge in edges
    ]
    found = analyses.circuit_faithfulness(model, circuit, [PAIR], answer="Mary", wrong="John")
    kept = found["mean"].sel(score="faithfulness").item()
    assert kept == pytest.approx(NUMBERS["faithfulness"], abs=1e-4)
