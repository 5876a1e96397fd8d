"""`Processes`: workers as processes of this machine, each with its own model and threads.

A driver asks an engine for workers, gives them tasks and waits for answers. A worker that ends is an answer too.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Protocol

from headwater.analyses._sweeps.worker import Setup

Answer = dict[str, Any]
MODULE = "headwater.analyses._sweeps.worker"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
GRACE = 5.0  # seconds for a process to end by itself


class Engine(Protocol):
    """Where workers run."""

    def open(self) -> int:
        """Start a worker; its first answer is of the kind `opened`."""
        ...

    def give(self, worker: int, tasks: Sequence[Mapping[str, Any]]) -> None:
        """Tasks {number, key} for a worker, which answers them in their order."""
        ...

    def wait(self, seconds: float) -> list[tuple[int, Answer]]:
        """Answers that came; after so many seconds without any, none. A worker that ended answers `died` once."""
        ...

    def retire(self, worker: int) -> None:
        """End a worker; it answers no more."""
        ...

    def close(self) -> None:
        """End all of them, at once."""
        ...


@dataclass
class _Process:
    run: subprocess.Popen[bytes]
    errors: IO[bytes]
    left: bytes = b""
    tasks: list[Any] = field(default_factory=list)


class Processes:
    """Workers of this machine; `threads` are those of each."""

    def __init__(self, setup: Setup, threads: int) -> None:
        self._setup = json.dumps(asdict(setup)).encode() + b"\n"
        self._environment = {
            **os.environ,
            **dict.fromkeys(THREADS, str(threads)),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Process] = {}
        self._opened = 0

    def open(self) -> int:
        errors = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as its process
        run = subprocess.Popen(
            [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env=self._environment, start_new_session=True,  # Ctrl-C is for the driver, who ends its workers
        )  # fmt: skip
        self._opened += 1
        self._workers[self._opened] = _Process(run, errors)
        assert run.stdout is not None
        self._selector.register(run.stdout, selectors.EVENT_READ, self._opened)
        self._send(self._opened, self._setup)
        return self._opened

    def give(self, worker: int, tasks: Sequence[Mapping[str, Any]]) -> None:
        self._send(worker, b"".join(json.dumps(task).encode() + b"\n" for task in tasks))

    def wait(self, seconds: float) -> list[tuple[int, Answer]]:
        found: list[tuple[int, Answer]] = []
        for key, _ in self._selector.select(seconds):
            worker = key.data
            process = self._workers[worker]
            came = os.read(key.fd, 2**20)
            *lines, process.left = (process.left + came).split(b"\n")
            found += [(worker, json.loads(line)) for line in lines]
            if not came:
                found.append((worker, {"kind": "died", "reason": self._end(worker)}))
        return found

    def retire(self, worker: int) -> None:
        self._end(worker)

    def close(self) -> None:
        for process in self._workers.values():
            process.run.kill()
        for worker in list(self._workers):
            self._end(worker)
        self._selector.close()

    def _send(self, worker: int, content: bytes) -> None:
        stream = self._workers[worker].run.stdin
        assert stream is not None
        try:
            stream.write(content)
            stream.flush()
        except OSError:
            pass  # it has ended, which `wait` will tell

    def _end(self, worker: int) -> str:
        """Close a process that ended or is to end; why it ended, in words."""
        process = self._workers.pop(worker)
        run = process.run
        assert run.stdin is not None
        assert run.stdout is not None
        self._selector.unregister(run.stdout)
        for stream in (run.stdin, run.stdout):
            with contextlib.suppress(OSError):  # what was to be sent found no reader
                stream.close()
        try:
            code = run.wait(GRACE)
        except subprocess.TimeoutExpired:
            run.kill()
            code = run.wait()
        with process.errors as errors:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 2000))
            said = errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        return f"the worker ended with {how}" + (f": {said[-1]}" if said and code > 0 else "")
