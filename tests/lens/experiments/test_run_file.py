"""An experiment's file runs again and says whether it agrees; an interrupted run goes on.

Seen to fail with the digest not compared, with the journal's first line not read, and with `math.isclose` replaced by
True.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_experiments import PROMPT, asked

import headwater as hw
from headwater.lens.errors import ExperimentError
from headwater.lens.experiments.results import Results
from headwater.lens.experiments.run_file import run_file


@pytest.fixture(scope="module")
def model():
    return hw.load("tasks-4l")


def test_a_second_run_verifies_and_a_changed_number_is_found(model, tmp_path):
    file = asked(measures=["loss", "entropy"]).save(tmp_path / "run.json")
    first = run_file(file, model)
    assert (first.verified, first.path) == (None, tmp_path / "run.results.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "run.results.json"]
    written = first.path.read_bytes()
    second = run_file(file, model)
    assert second.verified is True
    assert second.largest == 0
    assert second.results.digest == first.results.digest
    assert first.path.read_bytes() == written

    data = json.loads(written)
    data["results"][0]["after"]["loss"] += 1e-3
    first.path.write_text(json.dumps(data))
    with pytest.raises(ExperimentError, match="changed after it was written"):
        run_file(file, model)
    forged = Results(**{n: data[n] for n in Results.__dataclass_fields__})
    first.path.write_text(forged.to_json())
    third = run_file(file, model)
    assert third.verified is False
    assert third.differing == ["results.0.after.loss"]
    assert third.largest == pytest.approx(1e-3)
    asked(measures=["loss", "entropy"], tolerance=1e-2).save(file)
    with pytest.raises(ExperimentError, match="another version of this experiment"):
        run_file(file, model)


def test_an_interrupted_run_goes_on_where_it_was(model, tmp_path):
    file = asked(prompts=[PROMPT, "Mary and John went", "the store"], measures=["loss"]).save(
        tmp_path / "run.json"
    )

    def stop(done, of):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_file(file, model, stop)
    assert model.edits == ()
    journal = tmp_path / "run.partial.jsonl"
    assert len(journal.read_text().splitlines()) == 3
    assert not (tmp_path / "run.results.json").exists()
    journal.write_text(journal.read_text() + '{"prompt": 2, "resu')  # as if killed within a line
    told = []
    outcome = run_file(file, model, lambda done, of: told.append((done, of)))
    assert told == [(3, 3)]
    assert not journal.exists()
    (tmp_path / "run.results.json").unlink()
    assert run_file(file, model).results.results == outcome.results.results
    # a changed digit is measured again, and so are the lines behind it
    (tmp_path / "run.results.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        run_file(file, model, stop)
    text = journal.read_text()
    value = outcome.results.results[0]["after"]["loss"]
    journal.write_text(text.replace(str(value), str(value + 1)))
    assert journal.read_text() != text
    assert run_file(file, model).results.results == outcome.results.results
    # a journal of another experiment is not taken up
    (tmp_path / "run.results.json").unlink()
    journal.write_text('{"inputs": "other"}\n{"prompt": 0, "result": {"before": {"loss": 0.0}}}\n')
    assert run_file(file, model).results.results == outcome.results.results


def test_two_runs_of_one_file_do_not_meet(model, tmp_path):
    file = asked(prompts=[PROMPT, "the store"], measures=["loss"]).save(tmp_path / "run.json")

    def again(done, of):
        with pytest.raises(ExperimentError, match="in use by another run"):
            run_file(file, model)

    first = run_file(file, model, again)
    assert (first.verified, sorted(p.name for p in tmp_path.iterdir())) == (
        None,
        ["run.json", "run.results.json"],
    )


def test_a_full_disk_leaves_the_old_results(model, tmp_path, monkeypatch):
    file = asked(measures=["loss"]).save(tmp_path / "run.json")
    import os

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ExperimentError, match="No space left"):
        run_file(file, model)
    monkeypatch.undo()
    assert sorted(Path(p).name for p in tmp_path.iterdir()) == ["run.json", "run.partial.jsonl"]
    assert run_file(file, model).verified is None
