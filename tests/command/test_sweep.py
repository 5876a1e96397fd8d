"""`headwater sweep`: runs, status, resume, merge, export; exit codes; kills and Ctrl-C leave a run that goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from sweep_engines import Here, open_once

import headwater as hw

TEXTS = [f"Mary gave John a drink {n}" for n in range(12)]


def written(path: Path, **more) -> Path:
    asked = {"model": "tasks-4l", "prompts": TEXTS[:4], "analyses": [{"analysis": "rollout"}]}
    path.write_text(json.dumps(asked | more))
    return path


@pytest.fixture
def here(monkeypatch):
    open_once(monkeypatch)
    monkeypatch.setattr(
        "headwater.analyses._sweeps.run_sweep._engine", lambda kind, setup, sweep, n: Here(setup, {})
    )


def test_it_runs_tells_resumes_and_merges(here, headwater, tmp_path):
    file = written(tmp_path / "s.json")
    ran = headwater("sweep", file)
    assert ran.exit_code == 0, ran.stderr
    assert "4 units in" in ran.stderr
    assert "units to go: about" in ran.stderr
    told = json.loads(headwater("sweep", "status", tmp_path / "s.run", "--verify", "--json").stdout)
    assert (told["done"], told["queued"], told["failed"], told["damaged"]) == (4, 0, 0, [])
    assert told["digest"] == hw.SweepRun(tmp_path / "s.run").digest()
    assert told["digest"] in ran.stdout
    assert headwater("sweep", "resume", tmp_path / "s.run").exit_code == 0
    for part in ("1/2", "2/2"):
        assert headwater("sweep", "--shard", part, file).exit_code == 0
    shards = [tmp_path / f"s.{n}-of-2.run" for n in (2, 1)]
    merged = headwater("sweep", "merge", *shards, "--out", tmp_path / "m", "--json")
    assert json.loads(merged.stdout)["digest"] == told["digest"]


def test_failures_and_damage_end_with_1_and_say_why(here, headwater, tmp_path):
    pairs = [{"clean": "Mary gave", "corrupt": "John"}]
    file = written(tmp_path / "s.json", pairs=pairs, prompts=[], analyses=[{"analysis": "patch"}])
    ran = headwater("sweep", file)
    assert ran.exit_code == 1
    assert "unit 0 failed: " in ran.stdout
    run = hw.SweepRun(tmp_path / "s.run")
    headwater("sweep", written(tmp_path / "t.json"))
    run = hw.SweepRun(tmp_path / "t.run")
    run.file(run.table().key[1]).write_bytes(b"x")
    found = headwater("sweep", "status", tmp_path / "t.run", "--verify")
    assert found.exit_code == 1
    assert "is missing or was changed" in found.stdout
    assert headwater("sweep", "resume", "--verify", run.path).exit_code == 0
    assert headwater("sweep", "status", run.path, "--verify").exit_code == 0


def test_a_run_becomes_one_table(here, headwater, tmp_path):
    pairs = [{"clean": "Mary gave", "corrupt": "John"}]  # of which the analysis knows no answer
    analyses = [{"analysis": "sink_rate"}, {"analysis": "patch"}]
    headwater("sweep", written(tmp_path / "s.json", pairs=pairs, analyses=analyses))
    told = headwater("sweep", "export", tmp_path / "s.run", "--out", tmp_path / "a.csv")
    assert told.exit_code == 0, told.stderr
    assert "a.csv: 4 units; 0 queued and 1 failed ones are not in it" in told.stdout
    table = pd.read_csv(tmp_path / "a.csv")
    assert set(table.analysis) == {"sink_rate"}
    results = [result for _, result in hw.SweepRun(tmp_path / "s.run").results()]
    assert len(table) == sum(array.size for each in results for array in each.data_vars.values())
    told = headwater("sweep", "export", tmp_path / "s.run", "--out", tmp_path / "a.xlsx")
    assert told.exit_code == 2
    assert "ends in neither .parquet nor .csv" in told.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["absent.json"], "No such file"),
        (["status", "."], "holds no run"),
        (["resume", "absent"], "holds no run"),
        (["merge", "absent", "--out", "x"], "holds no run"),
        (["s.json", "--shard", "3"], "write it as 3/8"),
        (["s.json", "--shard", "9/8"], "does not exist"),
        (["s.json", "--engine", "slurm"], "'slurm' is not one of"),
    ],
)
def test_bad_calls_are_one_line_and_two(here, headwater, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "s.json")
    ran = headwater("sweep", *words)
    assert ran.exit_code == 2, ran.output
    assert told in ran.stderr.splitlines()[-1]


def started(file: Path) -> subprocess.Popen[bytes]:
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "headwater", "sweep", file, "--workers", "1"], stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, env=quiet,
        # a shell starts what it runs in the background with interrupts ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def done_in(folder: Path) -> int:
    return len(list(folder.glob("units/*/*.safetensors")))


@pytest.mark.slow
def test_kills_at_random_moments_and_ctrl_c_change_no_number(tmp_path, here, headwater):
    """SIGKILL of the driver while units are written, then Ctrl-C, then the rest: the digest is that of a quiet run."""
    file = written(
        tmp_path / "s.json", prompts=TEXTS, seeds=list(range(3)), analyses=[{"analysis": "agreement"}]
    )
    draw = random.Random(0)
    for way in (signal.SIGKILL, signal.SIGINT):
        before = done_in(tmp_path / "s.run")
        run = started(file)
        while run.poll() is None and done_in(tmp_path / "s.run") <= before:
            time.sleep(0.02)
        time.sleep(draw.random() / 2)
        run.send_signal(way)
        _, said = run.communicate()
        assert run.returncode == (130 if way == signal.SIGINT else -9), said
        counts = hw.SweepRun(tmp_path / "s.run").counts()
        assert sum(counts.values()) == 36
        assert 0 < counts["done"] < 36
        assert not list(hw.SweepRun(tmp_path / "s.run").damaged())
    ran = headwater("sweep", "resume", tmp_path / "s.run")
    assert ran.exit_code == 0, ran.stderr
    quiet = headwater("sweep", file, "--out", tmp_path / "quiet")
    assert quiet.stdout.splitlines()[-1] == ran.stdout.splitlines()[-1]
    assert not list(tmp_path.rglob("*.part"))
