"""Commands that are interrupted (Ctrl-C) at random moments: exit code 130, at most one line, nothing half-written.

`python tests/support/interrupts.py COUNT [SEED [NAME…]]` prints, for each command, how many times it was interrupted
and how many times it had come to its end before. One process imports Headwater; its children are interrupted.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from kills import OTHER, TEXT
from small_experiments import asked

import headwater as hw
from headwater.command import cli, verify
from headwater.lens.errors import HeadwaterError

COMMANDS: dict[str, list[str]] = {
    "record": ["record", TEXT, "--out", "a.safetensors"],
    "analyze": ["analyze", "rollout", TEXT, "--html", "a.html"],
    "analyze patch": [
        "analyze", "patch", TEXT, OTHER, "--set", "answer=Mary", "--set", "wrong=John", "--html", "a.html",
    ],
    "experiment": ["experiment", "run.json"],
    "corpus": ["corpus", "texts.jsonl", "--out", "c.safetensors"],
    "sweep": ["sweep", "asked/sweep.json", "--workers", "1", "--out", "a.run"],
    "verify": ["verify", "run.json"],
    "doctor": ["doctor", "--json"],
    "models": ["models", "--json"],
}  # fmt: skip
BEGUN = ("told", "texts.jsonl", "run.partial.jsonl", ".c.safetensors.lock")  # beside what is finished
PROGRESS = re.compile(r"\d units|units in|of \d+ texts")
GRACE = 5.0  # seconds in which the processes of a command end after it


def interrupted(command: Sequence[str], count: int, chance: random.Random) -> dict[str, int]:
    """Interrupt a command so many times, and look at what it says and leaves."""
    ends, breaks = 0, 0
    taken = 0.0
    while breaks < count:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            put(folder)
            start = time.monotonic()
            child = begun(command, folder)
            if taken:
                time.sleep(chance.uniform(0, taken))
                os.kill(child, signal.SIGINT)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            taken = taken or time.monotonic() - start
            told = (folder / "told").read_text()
            assert status in (0, 130), f"{command[0]} ended with {status}: {told[-2000:]}"
            assert "Traceback" not in told, told[-2000:]
            assert len([line for line in told.splitlines() if not PROGRESS.search(line)]) <= 1, told
            whole(folder)
            end = time.monotonic() + GRACE
            while left := at_work(folder):
                assert time.monotonic() < end, f"{command[0]} leaves {left}"
                time.sleep(0.1)
            breaks, ends = breaks + (status == 130), ends + (status == 0)
    return {"interrupts": breaks, "ends": ends}


def put(folder: Path) -> None:
    """What the commands read."""
    asked(prompts=[TEXT] * 20, measures=["loss", "entropy"]).save(folder / "run.json")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{TEXT} {n}"}) + "\n" for n in range(60))
    )
    (folder / "asked").mkdir()
    sweep = {
        "model": "tasks-4l",
        "prompts": [TEXT],
        "seeds": list(range(40)),
        "analyses": [{"analysis": "agreement"}],
    }
    (folder / "asked" / "sweep.json").write_text(json.dumps(sweep))


def at_work(folder: Path) -> list[str]:
    """The processes that were begun in the folder; workers have sessions of their own."""
    found = []
    for each in psutil.process_iter():
        with suppress(psutil.Error):
            if each.status() != psutil.STATUS_ZOMBIE and Path(each.cwd()) == folder:
                found.append(" ".join(each.cmdline()))
    return found


def whole(folder: Path) -> None:
    """Every file in the folder is whole, and is one that the commands write."""
    for path in folder.iterdir():
        if path.suffix in (".safetensors", ".json"):
            try:
                verify.held(path)
            except HeadwaterError as error:
                raise AssertionError(f"{path.name} is half-written: {error}") from None
        elif path.suffix == ".html":
            assert path.read_text().endswith("</html>")
        elif path.suffix == ".run":
            if (path / "ledger.sqlite").exists():
                assert not list(hw.SweepRun(path).damaged())
        else:
            assert path.name in BEGUN or path.is_dir(), path.name


def begun(command: Sequence[str], folder: Path) -> int:
    """A child at the command, with its standard error in the file `told`."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open("told", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["headwater", *command]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt:  # before the command could hear it
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:  # whatever comes in between, nothing of the parent runs here
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a child hears it from the moment that its command begins
    hw.load("tasks-4l").record(TEXT)
    chance = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for name in sys.argv[3:] or COMMANDS:
        print(json.dumps({"name": name, **interrupted(COMMANDS[name], int(sys.argv[1]), chance)}), flush=True)
