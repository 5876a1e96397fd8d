"""A run of a sweep: its numbers are those of the analysis called directly, and what is done stays done."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import sweep_engines
import torch
import xarray as xr
from sweep_engines import Here, asked, open_once

import headwater as hw
from headwater.analyses._sweeps import run_sweep, sweep_run, worker
from headwater.analyses._sweeps.run_sweep import resume
from headwater.lens.errors import SweepError

ENGINE = "headwater.analyses._sweeps.run_sweep._engine"


@pytest.fixture
def here(monkeypatch):
    """Runs in this process with `faults`, those of `Here`. It gives the engines that were started, in a list."""
    started = []
    open_once(monkeypatch)

    def use(faults=None):
        def engine(kind, setup, sweep, workers):
            started.append(Here(setup, faults or {}))
            return started[-1]

        monkeypatch.setattr(ENGINE, engine)
        return started

    return use


def test_processes_give_the_numbers_of_a_direct_call_and_a_killed_one_is_replaced(tmp_path):
    """Two processes; one is killed in the middle of the run. Every result is that of the analysis, bit for bit."""
    pairs = [
        {
            "clean": "Mary gave John a drink",
            "corrupt": "John gave Mary a drink",
            "answer": "Mary",
            "wrong": "John",
        }
    ]
    analyses = [{"analysis": "rollout"}, {"analysis": "patch"}, {"analysis": "raw_attention"}]
    sweep = asked(pairs=pairs, analyses=analyses, layers=[[0, 1, 2], [3]], edits=sweep_engines.OFF)
    killed = []

    def tell(done, of):
        if done >= 8 and not killed:
            children = subprocess.run(
                ["pgrep", "-P", str(os.getpid()), "-f", "_sweeps.worker"], capture_output=True
            )
            killed.append(int(children.stdout.split()[0]))
            os.kill(killed[0], signal.SIGKILL)

    said = []
    run = hw.run_sweep(sweep, tmp_path / "a", workers=2, say=said.append, tell=tell)
    assert killed
    assert run.counts() == {"queued": 0, "done": 36, "failed": 0}
    assert any("units to go: about" in line for line in said)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = hw.load("tasks-4l")
    for unit, result in run.results():
        with model.edit(*map(hw.edit_from_dict, sweep.edits[unit["edits"]])):
            if unit["analysis"] == "patch":
                pair = pairs[unit["at"]]
                told = {"answer": pair["answer"], "wrong": pair["wrong"], "layers": unit["layers"]}
                direct = hw.analyses.patch(model, [pair["clean"]], [pair["corrupt"]], **told)
                xr.testing.assert_equal(direct, result)  # its attributes tell the answer in another way
            else:
                record = model.record(sweep_engines.TEXTS[unit["at"]], layers=unit["layers"])
                xr.testing.assert_identical(getattr(hw.analyses, unit["analysis"])(record), result)
    torch.set_num_threads(before)
    assert not list(run.damaged())


def test_units_are_computed_once_and_a_run_is_taken_up(here, tmp_path):
    started = here()
    run = hw.run_sweep(asked(), tmp_path / "a", workers=2)
    assert sorted(started[0].tasks) == [0, 1, 2, 3]
    digest = run.digest()
    hw.run_sweep(asked(), tmp_path / "a")
    resume(tmp_path / "a")
    assert len(started) == 1
    run.file(next(iter(run.table().key))).unlink()
    assert len(list(run.damaged())) == 1
    resume(tmp_path / "a")
    assert started[1].tasks == [0]
    assert run.digest() == digest
    (tmp_path / "b").mkdir()
    (tmp_path / "a").rename(tmp_path / "b" / "a")
    assert hw.SweepRun(tmp_path / "b" / "a").digest() == digest


def test_the_order_of_workers_changes_nothing(here, tmp_path):
    here()
    digests = {hw.run_sweep(asked(), tmp_path / str(n), workers=n).digest() for n in (1, 3)}
    assert len(digests) == 1
    files = [[p.read_bytes() for p in sorted((tmp_path / n / "units").rglob("*.safetensors"))] for n in "13"]
    assert files[0] == files[1]
    assert len(files[0]) == 4


def test_a_unit_that_ends_its_worker_is_tried_three_times_and_the_others_go_on(here, tmp_path):
    died = {"kind": "died", "reason": "the worker ended with signal 9 (SIGKILL)"}
    started = here({2: [died] * 3, 3: [died]})
    run = hw.run_sweep(asked(), tmp_path / "a", workers=1)
    table = run.table().set_index("number")
    assert list(table.state) == ["done", "done", "failed", "done"]
    assert list(table.attempts) == [0, 0, 3, 1]
    assert table.error[2] == "the worker ended with signal 9 (SIGKILL) (3 tries)"
    assert started[0].opened == 4  # none is opened after the last one, for which nothing is left
    here()
    resume(tmp_path / "a")
    assert run.counts()["failed"] == 1
    resume(tmp_path / "a", again=True)
    assert run.counts() == {"queued": 0, "done": 4, "failed": 0}


def test_what_an_analysis_refuses_fails_at_once_and_says_why(here, tmp_path):
    here()
    sweep = asked(
        pairs=[{"clean": "Mary gave", "corrupt": "Mary"}], prompts=[], analyses=[{"analysis": "patch"}]
    )
    run = hw.run_sweep(sweep, tmp_path / "a")
    (row,) = run.table().itertuples()
    assert (row.state, row.attempts) == ("failed", 0)
    assert "same, so give prompts of equal length" in row.error
    with pytest.raises(SweepError, match="has no result: it is failed"):
        run.result(0)


def test_a_worker_that_can_not_write_is_asked_no_more(here, tmp_path):
    full = {"kind": "disk", "reason": "can not write x: No space left on device"}
    started = here({1: [full]})
    said = []
    run = hw.run_sweep(asked(), tmp_path / "a", workers=2, say=said.append)
    assert run.counts()["done"] == 4
    assert started[0].ended
    assert any("asked no more" in line for line in said)
    here(dict.fromkeys(range(4), [full] * 2))
    with pytest.raises(SweepError, match=r"no worker can write: .*No space left on device; make room"):
        hw.run_sweep(asked(), tmp_path / "b", workers=2)
    assert hw.SweepRun(tmp_path / "b").counts() == {"queued": 4, "done": 0, "failed": 0}
    here()
    assert resume(tmp_path / "b").digest() == run.digest()


def test_a_file_that_the_driver_does_not_see_is_not_done(here, tmp_path, monkeypatch):
    here()
    monkeypatch.setattr(worker.Worker, "_write", lambda self, key, content: None)
    run = hw.run_sweep(asked(), tmp_path / "a")
    assert run.counts()["failed"] == 4
    assert "share" in run.table().error[0]


def test_no_room_is_said_before_most_is_computed(here, tmp_path, monkeypatch):
    here()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5000}))
    with pytest.raises(SweepError, match="not enough room"):
        hw.run_sweep(asked(), tmp_path / "a")
    assert hw.SweepRun(tmp_path / "a").counts() == {"queued": 3, "done": 1, "failed": 0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edits": sweep_engines.OFF}, "sweep: edits is"),
        ({"dtype": "float64"}, "revision is"),
        ({"threads": 2}, "sweep: threads is 1 there and 2 here"),
        ({"model": "sink-2l-softmax"}, "revision is"),
    ],
)
def test_another_run_of_the_same_folder_is_refused(here, tmp_path, change, words):
    here()
    hw.run_sweep(asked(prompts=["Mary"]), tmp_path / "a")
    with pytest.raises(SweepError, match=words):
        hw.run_sweep(asked(**{"prompts": ["Mary"]} | change), tmp_path / "a")


def test_changed_code_and_processors_are_refused(here, tmp_path, monkeypatch):
    here()
    hw.run_sweep(asked(), tmp_path / "a")
    monkeypatch.setattr(worker, "code_digest", lambda: "sha256:other")
    with pytest.raises(SweepError, match="of another run: code is"):
        resume(tmp_path / "a")
    monkeypatch.undo()
    here()
    (tmp_path / "a" / "ledger.sqlite").unlink()
    strange = {"kind": "opened", "facts": {}}
    monkeypatch.setattr(Here, "wait", lambda self, seconds: [(self.opened, strange)])
    with pytest.raises(SweepError, match="a worker is not like its run: capability is null"):
        resume(tmp_path / "a")


def test_two_drivers_of_one_folder_are_kept_apart(here, tmp_path):
    here()
    hw.run_sweep(asked(), tmp_path / "a")
    inside, free = threading.Event(), threading.Event()

    def hold():
        with sweep_run.alone(tmp_path / "a"):
            inside.set()
            free.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(20)
    try:
        with pytest.raises(SweepError, match=rf"in use by process {os.getpid()} on "):
            resume(tmp_path / "a")
    finally:
        free.set()
        holder.join()
    resume(tmp_path / "a")


def test_folders_that_hold_something_else_are_left_alone(here, tmp_path):
    here()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SweepError, match="holds other files"):
        hw.run_sweep(asked(), tmp_path)
    with pytest.raises(SweepError, match="holds no run"):
        hw.SweepRun(tmp_path)


def test_a_manifest_that_was_changed_is_refused(here, tmp_path):
    here()
    hw.run_sweep(asked(), tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    told = json.loads(file.read_text())
    told["sweep"]["threads"] = 2
    file.write_text(json.dumps(told))
    with pytest.raises(SweepError, match="was changed after it was written"):
        hw.SweepRun(tmp_path / "a")
    file.write_text("{}")
    with pytest.raises(SweepError, match="is no manifest"):
        hw.SweepRun(tmp_path / "a")


@pytest.mark.parametrize(("name", "value"), [("facts", ["a"]), ("sweep", []), ("shard", [1.0, 2.0])])
def test_a_manifest_of_other_kinds_with_a_right_digest_is_refused(here, tmp_path, name, value):
    here()
    hw.run_sweep(asked(prompts=["Mary"]), tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    told = json.loads(file.read_text()) | {name: value}
    told["digest"] = sweep_run.Manifest(told["sweep"], told["facts"], "").digest
    file.write_text(json.dumps(told))
    with pytest.raises(SweepError, match="is no manifest"):
        resume(tmp_path / "a")


def test_a_result_that_was_changed_is_not_read(here, tmp_path):
    here()
    run = hw.run_sweep(asked(), tmp_path / "a")
    file = run.file(run.table().key[2])
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(SweepError, match="another file than the one that was written"):
        run.result(2)
    assert [row.number for row in run.damaged()] == [2]
    digest = run.digest()
    with pytest.raises(SweepError, match="`headwater sweep resume --verify` computes it again"):
        list(run.results())
    resume(tmp_path / "a")
    assert [row.number for row in run.damaged()] == [2]
    assert resume(tmp_path / "a", verify=True).digest() == digest
    assert not list(run.damaged())


def test_a_record_that_an_edit_names_is_part_of_the_run(here, tmp_path):
    here()
    model = hw.load("tasks-4l")
    record = tmp_path / "r.safetensors"
    model.record("John gave Mary a drink").save(record)
    edits = {"frozen": [{"edit": "FreezeAttention", "record": record.name}]}
    sweep = asked(prompts=["Mary gave John a drink"], edits=edits)
    hw.run_sweep(sweep, tmp_path / "a", base=tmp_path)
    assert resume(tmp_path / "a").counts()["done"] == 1
    model.record("Mary gave Mary a drink").save(record)
    with pytest.raises(SweepError, match=r"of another run: record r\.safetensors is"):
        resume(tmp_path / "a")


def test_a_file_system_without_locks_keeps_nobody_out(here, tmp_path, monkeypatch):
    here()

    def refused(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refused)
    assert hw.run_sweep(asked(prompts=["Mary"]), tmp_path / "a").counts()["done"] == 1


def test_workers_of_one_gpu_are_one_where_none_are_asked_for(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8), raising=False)
    most = run_sweep.most_workers
    assert most(asked(threads=2), "local") == 4
    assert most(asked(threads=2, device="cuda"), "local") == 1
    assert most(asked(device="cuda"), "ray") == 8


def test_wrong_layers_and_prompts_are_said_before_anything_runs(here, tmp_path):
    started = here()
    with pytest.raises(SweepError, match=r"layers \[9\]: tasks-4l has no layer 9"):
        hw.run_sweep(asked(layers=[[9]]), tmp_path / "a")
    with pytest.raises(hw.HeadwaterError, match="prompt 1: "):
        hw.run_sweep(asked(prompts=["Mary", {"tokens": [10**6]}]), tmp_path / "b")
    assert not started


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edits": {"off": [{"edit": "AblateHeads", "heads": ["1.1"]}, {"edit": "AblateHeads", "heads": ["99.0"]}]}},
         "edits.off.1: no such head: 99.0"),
        ({"edits": {"off": [{"edit": "AblateHeads", "heads": "all", "layers": [9]}]}},
         "edits.off.0: no attention in layer 9"),
        ({"edits": {"off": [{"edit": "AblateHeads", "heads": "all", "part": "vision"}]}},
         "edits.off.0: tasks-4l has no part"),
        ({"analyses": [{"analysis": "raw_attention", "settings": {"heads": "1.1 99.0"}}]},
         "analyses.0.settings.heads: tasks-4l has no head 99.0; its layers are [0, 1, 2, 3], with heads 0 to 7"),
        ({"analyses": [{"analysis": "rollout"}, {"analysis": "raw_attention", "each": {"heads": ["all", ["1.8"]]}}]},
         "analyses.1.each.heads.1: tasks-4l has no head 1.8"),
        ({"analyses": [{"analysis": "redistribution_study", "settings": {"heads": "all; 0.1 1"}}]},
         "analyses.0.settings.heads: a head is written"),
        ({"analyses": [{"analysis": "raw_attention", "settings": {"layers": [0, 4]}}]},
         "analyses.0.settings.layers: tasks-4l has no layer 4"),
        ({"analyses": [{"analysis": "rollout", "each": {"last_layer": [3, 9]}}]},
         "analyses.0.each.last_layer.1: tasks-4l has no layer 9"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)  # fmt: skip
def test_what_the_model_lacks_is_said_before_anything_runs(here, tmp_path, change, words):
    started = here()
    with pytest.raises(SweepError, match=re.escape(words)) as caught:
        hw.run_sweep(asked(**change), tmp_path / "a")
    assert "\n" not in str(caught.value)
    assert not started


def test_words_and_places_from_the_end_are_left_to_the_analysis(here, tmp_path):
    here()
    settings = {"heads": ["all", "3.7 3.0"], "layers": [[-1], [3]]}
    run = hw.run_sweep(asked(analyses=[{"analysis": "raw_attention", "each": settings}]), tmp_path / "a")
    assert run.counts() == {"queued": 0, "done": 16, "failed": 0}


@pytest.mark.slow
def test_a_worker_ends_with_its_driver(tmp_path):
    """A driver that is killed leaves no process: its worker reads the end of the file."""
    code = (
        "import headwater as hw, sys\n"
        "sweep = hw.Sweep(model='tasks-4l', prompts=['Mary gave John ' * 40] * 1, seeds=list(range(500)),\n"
        "                 analyses=[{'analysis': 'agreement', 'settings': {'methods': ['raw', 'rollout']}}])\n"
        "hw.run_sweep(sweep, sys.argv[1], workers=1, tell=lambda done, of: print(done, flush=True))\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code, tmp_path / "a"], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    run.stdout.readline()
    run.stdout.readline()
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    run.kill()
    run.wait()
    run.stdout.close()
    assert found
    for _ in range(100):
        if not os.path.exists(f"/proc/{found[0]}"):
            return
        time.sleep(0.1)
    raise AssertionError("the worker goes on")
