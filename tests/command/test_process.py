"""The installed command as a process: doctor, models, Ctrl-C, a terminal without UTF-8, a closed pipe."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "headwater"]
QUIET = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments: str, **more) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=120, env={**QUIET, **more})


def test_the_console_script_is_the_module() -> None:
    script = Path(sys.executable).with_name("headwater")
    by_script = subprocess.run([script, "--help"], capture_output=True, timeout=60, check=True, env=QUIET)
    names = ("dashboard", "models", "record", "analyze", "doctor")
    assert all(name.encode() in by_script.stdout for name in names)


def test_the_list_of_analyses_is_there_at_once() -> None:
    """0.2 s of one processor; importing torch alone takes several times the limit."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert b"rollout" in run("analyze").stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_doctor_runs_the_backends_and_finds_them_right() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["ok"] is True
    trials = {trial["backend"]: trial for trial in found["backends"] if trial["device"] == "cpu"}
    for name in ("auto", "flash", "blocked", "reference"):
        assert trials[name]["largest_error"] < 1e-5
    assert all(trial["ok"] if trial["ran"] else trial["reason"] for trial in trials.values())
    text = run("doctor")
    assert text.returncode == 0
    assert found["torch"]["version"] in text.stdout.decode()
    chosen = {choice["problem"]: choice for choice in found["choices"] if choice["device"] == "cpu"}
    assert chosen["causal"]["backend"] == "flash"
    assert chosen["normaliser cog"]["backend"] == "blocked"
    assert "cog" in chosen["normaliser cog"]["reason"]
    assert all(choice["reason"] for choice in chosen.values())
    assert chosen["soft-capped scores"]["reason"] in text.stdout.decode()


def test_the_embedded_model_is_listed_and_is_the_default() -> None:
    assert "tasks-4l" in json.loads(run("models", "--json").stdout)
    told = run(
        "record", "When Mary and John went to the store , John gave a drink to", "--json", "-s", "entropy"
    )
    assert told.returncode == 0, told.stderr
    assert told.stderr == b""  # no progress where nobody watches
    assert json.loads(told.stdout)["attrs"]["model"] == "tasks-4l"


def test_a_terminal_of_another_encoding_gets_escapes_and_no_traceback() -> None:
    told = run("analyze", "rollout", "--about", PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert told.returncode == 0, told.stderr
    assert b"\\u0100" in told.stdout  # the formula's A with a bar, which Latin-1 lacks


def test_a_missing_extra_is_named() -> None:
    without = "import sys; sys.modules['streamlit'] = None; sys.argv = ['headwater', 'dashboard']"
    told = subprocess.run(
        [sys.executable, "-c", f"{without}; from headwater.command.cli import main; main()"],
        capture_output=True, timeout=120, env=QUIET,
    )  # fmt: skip
    assert told.returncode == 2
    assert told.stderr.decode().splitlines() == [
        "headwater: this needs streamlit, which is missing; pip install 'headwater[dashboard]'"
    ]


def hear_interrupts() -> None:
    """A shell starts what it runs in the background with interrupts ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_dashboard_prints_its_address_serves_it_and_ends(tiny) -> None:
    server = subprocess.Popen(
        [*COMMAND, "dashboard", tiny, "--port", "8740"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=QUIET,
        preexec_fn=hear_interrupts,
    )
    try:
        assert server.stdout is not None
        lines = iter(server.stdout.readline, b"")
        address = next(found[0] for line in lines if (found := re.search(rb"http://127\.0\.0\.1:\d+", line)))
        with urllib.request.urlopen(f"{address.decode()}/_stcore/health", timeout=120) as answer:
            assert answer.read() == b"ok"
        server.send_signal(signal.SIGINT)
        assert server.wait(120) in (0, 130)
        assert server.stderr is not None
        assert server.stderr.read() == b""
    finally:
        server.kill()
        server.communicate()


def test_ctrl_c_ends_with_130_and_no_traceback(tiny) -> None:
    waiting = subprocess.Popen(
        [*COMMAND, "record", "-", "-m", tiny], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=QUIET,
        preexec_fn=hear_interrupts,
    )  # fmt: skip
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(3)  # it reads standard input
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(120) == 130
        assert waiting.stderr is not None
        assert b"Traceback" not in waiting.stderr.read()
    finally:
        waiting.kill()
        waiting.communicate()


def test_a_reader_that_leaves_early_gets_no_traceback(tiny) -> None:
    told = subprocess.run(
        ["bash", "-c", f"'{sys.executable}' -m headwater record 'the cat' -m '{tiny}' --json | head -c 10"],
        capture_output=True, timeout=120, env=QUIET,
    )  # fmt: skip
    assert b"Traceback" not in told.stderr
