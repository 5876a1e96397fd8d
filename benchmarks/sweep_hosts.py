"""Three hosts on one machine, a Ray head and two workers: what goes wrong on one changes no number; docs/scale.md.

`python benchmarks/sweep_hosts.py`, as root on Linux, with `ip` (iproute2) and ray. Each host is a network namespace
with an address of its own on one bridge; they share the file system, where the run folder lies. Runs of one sweep:

    quiet    local processes, undisturbed
    worker   a host is killed in the middle, while the other one runs at a fifth of its speed
    head     the head and its driver are killed in the middle; a new head is begun, and the run is taken up
    disk     one host finds a full file system where the run folder lies

The digests of their results are the same, or the script ends with an error. What was seen goes to
benchmarks/results/sweep_hosts.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import headwater as hw

RESULTS = Path(__file__).parent / "results" / "sweep_hosts.json"
HOSTS = ("hw-head", "hw-one", "hw-two")
BRIDGE, PORT = "hw-bridge", 6379
ADDRESS = "10.77.0.{}"
TEXT = "Mary gave John a drink and John went to the store"
PROMPTS = 120
SLOW = 0.2  # of its speed
LONGEST = 240  # seconds of one run


def ran(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Three namespaces on one bridge."""
    try:
        ran("ip", "link", "add", BRIDGE, "type", "bridge")
        ran("ip", "link", "set", BRIDGE, "up")
        for n, host in enumerate(HOSTS, 1):
            ran("ip", "netns", "add", host)
            ran("ip", "link", "add", f"{host}-v", "type", "veth", "peer", "name", "eth0", "netns", host)
            ran("ip", "link", "set", f"{host}-v", "master", BRIDGE, "up")
            ran("ip", "-n", host, "addr", "add", f"{ADDRESS.format(n)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ran("ip", "-n", host, "link", "set", device, "up")
            ran("ip", "-n", host, "route", "add", "default", "dev", "eth0")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", BRIDGE], stderr=subprocess.DEVNULL)


class Host:
    """What runs in one namespace: Ray, and the driver on the head's. `full` is a folder that is full there."""

    def __init__(self, number: int, folder: Path, full: Path | None = None) -> None:
        self.name = HOSTS[number - 1]
        words = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            f"--temp-dir={folder / 'ray'}",
        ]
        words += [f"--node-ip-address={ADDRESS.format(number)}", "--object-store-memory=80000000"]
        words += (
            ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
            if number == 1
            else [f"--address={ADDRESS.format(1)}:{PORT}", "--num-cpus=1"]
        )
        # a mount in a namespace is seen nowhere else: Ray's sockets and logs are the host's own, but for the head's,
        # which the driver reads; and so is a folder that is full
        mounts = [f"mount -t tmpfs -o size=1g ray {folder / 'ray'}"] if number > 1 else []
        mounts += [f"mount -t tmpfs -o size=4k,nr_inodes=1 full {full}"] if full is not None else []
        words = ["sh", "-c", " && ".join([*mounts, f"exec {' '.join(words)}"])]
        self.log = folder / f"{self.name}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.run = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *words], start_new_session=True, stdout=log, stderr=log
            )
        self._end = threading.Event()

    def ready(self) -> None:
        """Wait until Ray runs here."""
        begun = time.monotonic()
        while "Ray runtime started" not in self.log.read_text():
            if self.run.poll() is not None or time.monotonic() - begun > LONGEST:
                raise SystemExit(f"Ray does not start on {self.name}: {self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def pids(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def working(self) -> list[int]:
        """Its actors that are computing a unit."""
        return [pid for pid in self.pids() if _command(pid).startswith("ray::Actor.answer")]

    def slow(self) -> None:
        """From now on its actors are stopped for most of the time."""
        threading.Thread(target=self._brake, daemon=True).start()

    def _brake(self) -> None:
        while not self._end.is_set():
            actors = self.working()
            for way, seconds in ((signal.SIGSTOP, 0.2 * (1 - SLOW)), (signal.SIGCONT, 0.2 * SLOW)):
                for pid in actors:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, way)
                time.sleep(seconds)

    def kill(self) -> None:
        """End the host: everything that runs in its namespace."""
        self._end.set()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.run.wait()


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@contextlib.contextmanager
def cluster(folder: Path, full: Path | None = None) -> Iterator[list[Host]]:
    """A head and two workers; with `full` that folder is full on the last one."""
    hosts: list[Host] = []
    try:
        for number in (1, 2, 3):
            hosts.append(Host(number, folder, full if number == 3 else None))
            hosts[-1].ready()
        yield hosts
    finally:
        for host in hosts:
            host.kill()


def driver(file: Path, out: Path) -> subprocess.Popen[str]:
    """`headwater sweep` on the head's host."""
    words = ["ip", "netns", "exec", HOSTS[0], sys.executable, "-m", "headwater", "sweep", file, "--out", out]
    quiet = {**os.environ, "RAY_ADDRESS": f"{ADDRESS.format(1)}:{PORT}"}
    return subprocess.Popen(
        [*map(str, words), "--engine", "ray", "--workers", "2"], env=quiet, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(run: subprocess.Popen[str]) -> str:
    """What a driver said that came to its end."""
    _, said = run.communicate(timeout=LONGEST)
    if run.returncode:
        raise SystemExit(f"a run ended with {run.returncode}: {said[-3000:]}")
    return said


def until(out: Path, many: int, run: subprocess.Popen[str]) -> int:
    """Wait for so many results; how many there are, and the run is in its middle."""
    begun = time.monotonic()
    while True:
        there = len(list(out.glob("units/*/*.safetensors")))
        if run.poll() is not None or time.monotonic() - begun > LONGEST:
            raise SystemExit(f"no {many} units came: {run.stderr.read()[-3000:] if run.stderr else ''}")
        if there >= many:
            return there
        time.sleep(0.05)


def disturbed(file: Path, folder: Path) -> dict[str, Any]:
    """The three runs that are disturbed, and what was seen of each."""
    seen: dict[str, Any] = {}
    worker, head, disk = (folder / name for name in ("worker", "head", "disk"))
    with cluster(folder) as hosts:
        hosts[2].slow()
        run = driver(file, worker)
        until(worker, 15, run)
        while not hosts[1].working():
            until(worker, 0, run)
        seen["worker"] = {"killed_after": until(worker, 15, run)}
        hosts[1].kill()
        ended(run)
        seen["worker"]["tried_again"] = int(hw.SweepRun(worker).table().attempts.sum())
    with cluster(folder) as hosts:
        run = driver(file, head)
        seen["head"] = {"killed_after": until(head, 15, run)}
        hosts[0].kill()  # the driver runs there
        run.wait(LONGEST)
        seen["head"]["done_then"] = hw.SweepRun(head).counts()["done"]
    with cluster(folder):
        ended(driver(file, head))
    disk.mkdir()
    with cluster(folder, full=disk) as hosts:
        hosts[1].slow()  # so that not all is done before the other one tries
        said = ended(driver(file, disk))
    seen["disk"] = {"hosts_asked_no_more": said.count("asked no more")}
    return seen


def main() -> None:
    os.environ |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex(), "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="hw-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        file = folder / "sweep.json"
        prompts = [f"{TEXT} {n}" for n in range(PROMPTS)]
        asked = {"model": "tasks-4l", "prompts": prompts, "analyses": [{"analysis": "head_importance"}]}
        file.write_text(json.dumps(asked))
        hw.run_sweep(hw.Sweep.open(file), folder / "quiet", base=folder, workers=2)
        with network():
            seen = disturbed(file, folder)
        runs = {name: hw.SweepRun(folder / name) for name in ("quiet", *seen)}
        digests = {name: run.digest() for name, run in runs.items()}
        done = {name: run.counts()["done"] for name, run in runs.items()}
    if len(set(digests.values())) != 1 or set(done.values()) != {PROMPTS}:
        raise SystemExit(f"the results differ: {digests} {done}")
    if seen["worker"]["tried_again"] < 1 or seen["disk"]["hosts_asked_no_more"] != 1:
        raise SystemExit(f"not everything went wrong that was to: {seen}")
    told = {
        "date": datetime.now(UTC).date().isoformat(), "processors": os.cpu_count(), "hosts": len(HOSTS),
        "units": PROMPTS, **seen, "digest": digests["quiet"],
    }  # fmt: skip
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
