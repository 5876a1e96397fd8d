"""`RayActors`: workers as actors of a Ray cluster, or of this machine where no cluster is named.

An actor holds the model, as a local process does, and writes the file of each unit into the run folder, which all hosts
share; Ray carries numbers, keys and digests alone. Ray's own restarts and retries are off: the driver replaces what has
died and counts the attempts in its ledger, as it does for processes. Ray pickles what it carries and runs what it is
sent, so whoever has the cluster's token can run code on it; without a token no cluster is joined or begun here.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwater.analyses._sweeps.processes import Answer
from headwater.analyses._sweeps.worker import Setup, Worker
from headwater.lens.errors import HeadwaterError, SweepError, first_line, named_line

ADDRESS, TOKEN_FILE, TOKEN = "RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"
STORE = 80 * 2**20  # bytes of the object store, the least that Ray takes: no result goes there


class Actor:
    """A worker inside of Ray."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.worker: Worker | None = None
        self.setup = Setup(**setup)

    def open(self) -> Answer:
        try:
            self.worker = Worker(self.setup)
        except HeadwaterError as error:
            return {"kind": "unopened", "reason": " ".join(str(error).split())}
        return {"kind": "opened", "facts": self.worker.facts}

    def answer(self, number: int, key: str) -> Answer:
        assert self.worker is not None
        return self.worker.answer(number, key)


class RayActors:
    """Workers in Ray; `threads` are the processors that each of them reserves (Ray sets OMP_NUM_THREADS
    by it), `gpu` says whether it has one."""

    def __init__(self, setup: Setup, threads: int, workers: int, gpu: bool = False) -> None:
        self._ray = _ray()
        self._owner = not self._ray.is_initialized()
        self._around = contextlib.ExitStack()
        self._around.enter_context(contextlib.redirect_stdout(sys.stderr))  # Ray prints what its hosts say
        if self._owner:
            try:
                _join(self._ray, workers * threads)
            except SweepError:
                self._around.close()
                raise
        options: dict[str, Any] = {"num_cpus": threads, "num_gpus": int(gpu)}
        self._make = self._ray.remote(Actor).options(max_restarts=0, max_task_retries=0, **options).remote
        self._setup = vars(setup)
        self._actors: dict[int, Any] = {}
        self._waiting: dict[Any, int] = {}  # what is to come: whose it is
        self._opened = 0

    def open(self) -> int:
        self._opened += 1
        actor = self._actors[self._opened] = self._make(self._setup)
        self._waiting[actor.open.remote()] = self._opened
        return self._opened

    def give(self, worker: int, tasks: Sequence[Mapping[str, Any]]) -> None:
        for task in tasks:
            self._waiting[self._actors[worker].answer.remote(task["number"], task["key"])] = worker

    def wait(self, seconds: float) -> list[tuple[int, Answer]]:
        if not self._waiting:
            return []
        ready, _ = self._ray.wait(list(self._waiting), num_returns=1, timeout=seconds)
        more, _ = self._ray.wait(list(self._waiting), num_returns=len(self._waiting), timeout=0)
        found: list[tuple[int, Answer]] = []
        came = {*ready, *more}
        for reference in [each for each in self._waiting if each in came]:  # in the order of the tasks
            worker = self._waiting.pop(reference, None)
            if worker is None:  # its worker has just been found dead
                continue
            try:
                found.append((worker, self._ray.get(reference)))
            except self._ray.exceptions.RayError as error:
                self._forget(worker)
                found.append((worker, {"kind": "died", "reason": _told(error)}))
        return found

    def retire(self, worker: int) -> None:
        self._ray.kill(self._actors[worker])
        self._forget(worker)

    def close(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        if self._owner:
            self._ray.shutdown()
        self._around.close()

    def _forget(self, worker: int) -> None:
        del self._actors[worker]
        self._waiting = {each: whose for each, whose in self._waiting.items() if whose != worker}


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise SweepError("the engine 'ray' needs ray; pip install 'headwater[distributed]'") from None
    return ray


def _join(ray: Any, processors: int) -> None:
    """The cluster at RAY_ADDRESS, with its token; without an address a new one on this machine."""
    address = os.environ.get(ADDRESS)
    if address is None:
        os.environ.setdefault(TOKEN_FILE, str(_token_file()))
    elif TOKEN not in os.environ and not _token_path().is_file():
        raise SweepError(
            f"the cluster at {address} takes no driver without its token; name the file with {TOKEN_FILE}"
        )
    own: dict[str, Any] = {} if address else {"num_cpus": processors, "object_store_memory": STORE}
    own |= {} if address else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address=address or "local", log_to_driver=False, configure_logging=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SweepError(
            f"Ray does not start or is not reached: {first_line(error)}; look at {ADDRESS}"
        ) from None


def _token_path() -> Path:
    return Path(os.environ.get(TOKEN_FILE) or Path.home() / ".ray" / "auth_token")


def _token_file() -> Path:
    """The user's token, read by nobody else; a new one where there is none."""
    path = _token_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
        path.chmod(0o600)
    except OSError as error:
        raise SweepError(
            f"can not write the token {path}: {error.strerror}; give another path as {TOKEN_FILE}"
        ) from None
    return path


def _told(error: Exception) -> str:
    return f"the actor ended: {named_line(error)}"
