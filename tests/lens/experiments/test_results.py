"""Results hold numbers under a digest, and results of odd types are refused in one line."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from small_experiments import asked

import headwater as hw
from headwater.lens.errors import ExperimentError
from headwater.lens.experiments.results import Results
from headwater.lens.experiments.run_file import run_file


@pytest.fixture(scope="module")
def model():
    return hw.load("tasks-4l")


def test_the_digest_is_sha256_of_canonical_json(model):
    """Written again by hand, as another program would check it."""
    results = asked(measures=["loss"]).run(model)
    content = {"inputs": results.inputs, "revision": results.revision, "results": results.results}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert results.digest == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_results_of_any_size_are_read_by_the_version_that_wrote_them(model, tmp_path):
    file = asked(measures=["loss"]).save(tmp_path / "run.json")
    target = run_file(file, model).path
    target.write_text(target.read_text() + " " * (17 * 2**20))
    assert run_file(file, model).verified is True


@pytest.mark.parametrize("held", ["[5]", "[]", "5", '[{"after": {}}]', '[{"before": 3}]'])
def test_results_of_odd_types_are_refused_in_one_line(held, model, tmp_path):
    file = asked(measures=["loss"]).save(tmp_path / "run.json")
    target = run_file(file, model).path
    data = json.loads(target.read_text()) | {"results": json.loads(held)}
    target.write_text(Results(**{n: data[n] for n in Results.__dataclass_fields__}).to_json())
    with pytest.raises(ExperimentError, match="holds no results of an experiment"):
        run_file(file, model)


def test_a_loss_that_is_no_number_is_refused_in_one_line(model, tmp_path, monkeypatch):
    file = asked(measures=["loss"]).save(tmp_path / "run.json")
    monkeypatch.setattr(type(model), "loss", lambda self, found: torch.tensor([float("nan")]))
    with pytest.raises(ExperimentError, match=r"^prompt 0.before.loss is nan, which results can not hold"):
        run_file(file, model)
