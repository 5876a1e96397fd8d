"""A Ray head and two workers as three hosts of this machine: what goes wrong on one changes no number.

`python benchmarks/sweep_hosts.py [--json FILE]`, as root on Linux with `ip` and ray. Each host is a network namespace
with an address of its own on one bridge; they share the file system, and a run folder in it. Three runs of one sweep:

    quiet    local processes, uninterrupted
    worker   a raylet and its actor are killed in the middle, the other host runs at a fifth of its speed
    head     the head and the driver are killed in the middle; a new head is begun, and the run taken up

A digest that differs ends the run with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import headwater as hw

HOSTS = ("hw-head", "hw-one", "hw-two")
BRIDGE, PORT = "hw-bridge", 6379
ADDRESS = "10.77.0.{}"
TEXT = "Mary gave John a drink and John went to the store"
PROMPTS = 60


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
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", BRIDGE], stderr=subprocess.DEVNULL)


class Host:
    """A raylet, in the foreground of a session of its own, so that all of it can be ended."""

    def __init__(self, number: int, folder: Path, slow: bool = False) -> None:
        self.name = HOSTS[number - 1]
        role = ["--head", f"--port={PORT}", "--num-cpus=0"] if number == 1 else [
            f"--address={ADDRESS.format(1)}:{PORT}", "--num-cpus=1",
        ]  # fmt: skip
        words = ["ip", "netns", "exec", self.name, *(["nice", "-n", "19"] if slow else [])]
        words += [str(Path(sys.executable).with_name("ray")), "start", "--block", "--include-dashboard=false"]
        words += [f"--node-ip-address={ADDRESS.format(number)}", "--object-store-memory=80000000", *role]
        words += [f"--temp-dir={folder / 'ray'}"] if number == 1 else []
        self.run = subprocess.Popen(
            words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def kill(self) -> None:
        """End the host: everything that runs in its namespace."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True
        ).stdout.split()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self.run.wait()


def driver(file: Path, out: Path) -> subprocess.Popen[bytes]:
    """`headwater sweep` on the head's host."""
    words = ["ip", "netns", "exec", HOSTS[0], sys.executable, "-m", "headwater", "sweep", file, "--out", out]
    quiet = {**os.environ, "RAY_ADDRESS": f"{ADDRESS.format(1)}:{PORT}"}
    return subprocess.Popen([*map(str, words), "--engine", "ray", "--workers", "2"], env=quiet)


def until(out: Path, many: int) -> None:
    while len(list(out.glob("units/*/*.safetensors"))) < many:
        time.sleep(0.05)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--json", type=Path)
    given = asked.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="hw-"))
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    file = folder / "sweep.json"
    prompts = [f"{TEXT} {n}" for n in range(PROMPTS)]
    file.write_text(
        json.dumps({"model": "tasks-4l", "prompts": prompts, "analyses": [{"analysis": "head_importance"}]})
    )
    digests: dict[str, str] = {}
    try:
        hw.run_sweep(hw.Sweep.open(file), folder / "quiet", base=folder, workers=2)
        with network():
            hosts = [Host(1, folder)]
            time.sleep(8)
            hosts += [Host(2, folder), Host(3, folder, slow=True)]
            run = driver(file, folder / "worker")
            until(folder / "worker", 10)
            hosts[1].kill()
            assert run.wait(600) == 0
            run = driver(file, folder / "head")
            until(folder / "head", 10)
            for host in (hosts[2], hosts[0]):
                host.kill()  # the driver runs on the head's host and ends with it
            run.wait(60)
            hosts = [Host(1, folder)]
            time.sleep(8)
            hosts += [Host(2, folder), Host(3, folder)]
            assert driver(file, folder / "head").wait(600) == 0
            for host in hosts:
                host.kill()
        digests = {name: hw.SweepRun(folder / name).digest() for name in ("quiet", "worker", "head")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if len(set(digests.values())) != 1:
        raise SystemExit(f"the results differ: {digests}")
    print(json.dumps({"units": PROMPTS, "digests": digests}, indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps({"units": PROMPTS, "digests": digests}, indent=1) + "\n")


if __name__ == "__main__":
    main()
