"""A locale without UTF-8, odd names, no home, no network, a folder that can not be written, and Ctrl-C."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import interrupts
import pytest
from small_experiments import PROMPT, asked

ROOT = Path(__file__).parents[2]
BARE = {
    "PATH": os.environ["PATH"],
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "OMP_NUM_THREADS": "1",
}
# a process runs all commands, since most of a command's time is the import of torch; sockets lead nowhere
COMMANDS = """
import contextlib, io, json, os, socket, sys
def refuse(*_): raise OSError(101, "Network is unreachable")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from headwater.command import cli
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["headwater", *(os.fsdecode(bytes.fromhex(each)) for each in arguments)]
    out, told = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    for each in (out, told): each.flush()
    print(json.dumps([code, told.buffer.getvalue().decode("utf-8", "replace")]), flush=True)
"""


HTML: list[str | bytes] = ["analyze", "rollout", PROMPT, "--html", "a.html"]


def as_input(commands: Iterable[list[str | bytes]]) -> str:
    return json.dumps([[os.fsencode(word).hex() for word in words] for words in commands])


def commands(folder: Path, *each: list[str | bytes]) -> list[tuple[int, str]]:
    """The exit code and standard error of commands in a bare environment."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], input=as_input(each), capture_output=True, text=True, timeout=300, cwd=folder,
        env=BARE | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


ODD = (
    b"a b.safetensors",
    b"\xc3\xa4\n.safetensors",
    b"-x.safetensors",
    b"%s$(x).safetensors",
)


@pytest.mark.slow
def test_a_bare_environment(tmp_path: Path) -> None:
    asked(measures=["loss"]).save(tmp_path / "run.json")
    odd = [["record", b"--out=" + name, PROMPT] for name in ODD]
    again = [["verify", "--", name] for name in ODD]
    told = commands(
        tmp_path, ["models"], ["experiment", "run.json"], HTML,
        *odd, *again,
    )  # fmt: skip
    assert [code for code, _ in told] == [0] * len(told), told
    assert {os.fsencode(path.name) for path in tmp_path.glob("*.safetensors")} == set(ODD)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("unshare") is None or os.getuid() != 0, reason="mounts need root and unshare"
)
@pytest.mark.parametrize("options", ["ro", "size=64k"])
def test_a_disk_that_is_full_or_can_not_be_written(options: str, tmp_path: Path) -> None:
    """On a mounted file system of its own, in a name space of its own."""
    script = f"""
set -e
mount -t tmpfs -o size=1m none {tmp_path}
cp "$1" {tmp_path}/run.json
mount -o remount,{options} {tmp_path}
cd {tmp_path}
exec "$2" -c "$3"
"""
    source = asked(measures=["loss"]).save(tmp_path.parent / f"{tmp_path.name}.json")
    asks = ["record", PROMPT, "--keep", "qkv", "--out", "a"], ["experiment", "run.json"], HTML
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "x", str(source), sys.executable, f"{COMMANDS}print(os.listdir())"],
        input=as_input(asks), capture_output=True, text=True, timeout=300, env=BARE | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if "mount" in done.stderr and done.returncode:
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, left = done.stdout.splitlines()
    told = [json.loads(line) for line in lines]
    refused = [True, options == "ro", True]  # the results of the experiment fit
    for (code, said), fails in zip(told, refused, strict=True):
        assert code == (2 if fails else 0), told
        assert len(said.splitlines()) == fails, told
    kept = {"run.json"} | ({"run.results.json"} if options != "ro" else set())
    assert set(ast.literal_eval(left)) == kept


@pytest.mark.slow
def test_ctrl_c_at_random_moments() -> None:
    """A sweep, whose workers take seconds to begin, is interrupted in tests/command/test_sweep.py."""
    names = [name for name in interrupts.COMMANDS if name != "sweep"]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "interrupts.py", "1", "0", *names],
        capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert {json.loads(line)["interrupts"] for line in done.stdout.splitlines()} == {1}
