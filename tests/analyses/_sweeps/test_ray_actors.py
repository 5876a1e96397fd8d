"""Workers in Ray give the numbers of workers without it, also when an actor is killed; its token is nobody else's."""

import os
import stat
import subprocess
import sys

import pytest
from sweep_engines import Here, asked, open_once

import headwater as hw
from headwater.analyses._sweeps import ray_actors
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
