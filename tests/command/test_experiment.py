"""`headwater experiment`: runs, verifies with an exit code, and ends in one line on bad files."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import headwater as hw

PROMPT = "the cat sat on a mat ."


@pytest.fixture
def file(tiny, tmp_path: Path) -> Path:
    """An experiment beside the model's folder, so that it names the model by its folder."""
    (tmp_path / "model").symlink_to(tiny)  # a link out of the folder: --model is needed
    edits = [hw.Knockout(queries="all", keys=[0], heads="0.1")]
    return hw.Experiment(model="./model", prompts=[PROMPT], edits=edits).save(tmp_path / "run.json")


def test_it_runs_and_the_second_run_verifies(headwater, tiny, file) -> None:
    refused = headwater("experiment", file)
    assert refused.exit_code == 2
    assert "--model FOLDER" in refused.stderr
    first = headwater("experiment", file, "--model", tiny)
    assert first.exit_code == 0, first.stderr
    assert first.stdout.splitlines()[-1] == f"results in {file.with_name('run.results.json')}"
    second = headwater("experiment", file, "--model", tiny)
    assert second.exit_code == 0
    assert "verified: " in second.stdout
    told = json.loads(headwater("experiment", file, "--model", tiny, "--json").stdout)
    assert told == json.loads(file.with_name("run.results.json").read_text())
    model = hw.load(tiny)
    with model.edit(hw.Knockout(queries="all", keys=[0], heads="0.1")):
        assert told["results"][0]["after"]["loss"] == float(model.loss(PROMPT)[0])


def test_results_that_differ_end_with_1(headwater, tiny, file) -> None:
    from headwater.lens.experiments.results import Results

    headwater("experiment", file, "--model", tiny)
    target = file.with_name("run.results.json")
    data = json.loads(target.read_text())
    data["results"][0]["before"]["loss"] += 1
    target.write_text(Results(**{n: data[n] for n in Results.__dataclass_fields__}).to_json())
    run = headwater("experiment", file, "--model", tiny)
    assert run.exit_code == 1
    assert "NOT verified" in run.stdout
    assert "results.0.before.loss" in run.stdout


@pytest.mark.parametrize(
    ("content", "word"), [("", "line 1"), ("{}", "Field required"), ('{"model": 1, "model": 2}', "twice")]
)
def test_bad_files_are_one_line_and_two(headwater, tmp_path, content, word) -> None:
    file = tmp_path / "run.json"
    file.write_text(content)
    run = headwater("experiment", file)
    assert run.exit_code == 2
    assert len(run.stderr.splitlines()) == 1
    assert word in run.stderr
    assert headwater("experiment", tmp_path).exit_code == 2
    assert "No such file" in headwater("experiment", tmp_path / "absent.json").stderr


@pytest.mark.slow
def test_ctrl_c_leaves_what_is_done_and_the_next_run_goes_on(tmp_path) -> None:
    prompts = [f"{PROMPT} {'Mary gave John a drink ' * 20}"] * 400
    file = hw.Experiment(model="tasks-4l", prompts=prompts, measures=["loss"]).save(tmp_path / "run.json")
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [sys.executable, "-m", "headwater", "experiment", file], stderr=subprocess.PIPE, env=quiet,
        # a shell starts what it runs in the background with interrupts ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    journal = tmp_path / "run.partial.jsonl"
    try:
        for _ in range(600):
            if journal.exists() and journal.read_text().count("\n") > 2:
                break
            with pytest.raises(subprocess.TimeoutExpired):
                running.wait(0.1)
        running.send_signal(signal.SIGINT)
        assert running.wait(120) == 130
        assert running.stderr is not None
        assert b"Traceback" not in running.stderr.read()
    finally:
        running.kill()
        running.communicate()
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [json.loads(line["piece"])[0] for line in lines] == ["run", *map(str, range(len(lines) - 1))]
    assert len(lines) > 2
    assert not (tmp_path / "run.results.json").exists()
