"""Workers in Ray give the numbers of workers without it, also when an actor is killed; its token is nobody else's."""

import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
from sweep_engines import Here, asked, open_once

import headwater as hw
from headwater.analyses._sweeps import ray_actors
from headwater.analyses._sweeps.worker import Setup
from headwater.lens.errors import SweepError

CODE = """
import os, signal, subprocess, sys
import headwater as hw
from sweep_engines import asked

killed = []


def tell(done, of):
    if done >= 2 and not killed:
        found = subprocess.run(["pgrep", "-f", "^ray::Actor"], capture_output=True, text=True).stdout.split()
        own = os.getsid(0)
        found = [int(pid) for pid in found if os.getsid(int(pid)) == own]
        killed.append(found[0])
        os.kill(found[0], signal.SIGKILL)


run = hw.run_sweep(asked(), sys.argv[1], workers=2, engine="ray", tell=tell)
assert killed
print(run.digest(), sum(run.table().attempts))
"""


@pytest.mark.slow
def test_actors_give_the_same_bytes_and_a_killed_one_is_replaced(tmp_path, monkeypatch):
    """In a process of its own session, so that the actor that is killed is certainly ours."""
    pytest.importorskip("ray", reason="the engine needs ray, which is optional")
    token = tmp_path / "token"
    quiet = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONWARNINGS": "ignore"}
    quiet["PYTHONPATH"] = os.pathsep.join([*sys.path[:1], *filter(None, sys.path)])
    ran = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path / "a"], capture_output=True, text=True, env=quiet, timeout=300,
        start_new_session=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    open_once(monkeypatch)
    monkeypatch.setattr(
        "headwater.analyses._sweeps.run_sweep._engine", lambda kind, setup, sweep, n: Here(setup, {})
    )
    assert ran.stdout.split()[0] == hw.run_sweep(asked(), tmp_path / "b").digest()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_a_host_that_is_gone_is_one_death_for_each_of_its_workers(monkeypatch):
    """All tasks of an actor fail at once; what Ray answers is played here."""
    ray = PlayedRay()
    monkeypatch.setattr(ray_actors, "_ray", lambda: ray)
    engine = ray_actors.RayActors(Setup(".", "."), 1, 2)
    first, second = engine.open(), engine.open()
    assert [answer["kind"] for _, answer in engine.wait(0)] == ["opened"] * 2
    for worker in (first, second):
        engine.give(worker, [{"number": n, "key": "k"} for n in range(3)])
    ray.lost.add(engine._actors[first])
    assert [(worker, answer["kind"]) for worker, answer in engine.wait(0)] == [
        (first, "died"),
        *[(second, "done")] * 3,
    ]
    assert engine.wait(0) == []
    engine.close()


class PlayedRay:
    """As much of Ray as the engine calls. Every task has ended; those of the actors in `lost` have failed."""

    exceptions = SimpleNamespace(RayError=ConnectionError)

    def __init__(self):
        self.lost = set()

    def is_initialized(self):
        return True

    def remote(self, kind):
        return SimpleNamespace(options=lambda **given: SimpleNamespace(remote=lambda setup: PlayedActor()))

    def wait(self, references, num_returns, timeout):
        return references[:num_returns], references[num_returns:]

    def get(self, reference):
        if reference.actor in self.lost:
            raise ConnectionError("the actor is dead")
        return {"kind": reference.kind}

    def kill(self, actor):
        self.lost.add(actor)


class PlayedActor:
    def __init__(self):
        self.open = SimpleNamespace(remote=lambda: PlayedTask(self, "opened"))
        self.answer = SimpleNamespace(remote=lambda number, key: PlayedTask(self, "done"))


class PlayedTask:
    def __init__(self, actor, kind):
        self.actor, self.kind = actor, kind


def test_a_token_that_others_can_read_is_closed(tmp_path, monkeypatch):
    token = tmp_path / "deep" / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert ray_actors._token_file() == token
    first = token.read_text()
    assert len(first) == 64
    token.chmod(0o644)
    ray_actors._token_file()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() == first


def test_a_cluster_is_not_joined_without_its_token(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/absent/token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(SweepError, match="takes no driver without its token"):
        ray_actors._join(None, 1)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SweepError, match=r"pip install 'headwater\[distributed\]'"):
        ray_actors._ray()
