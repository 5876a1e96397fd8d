"""Free memory is what the machine, the control groups and the limits of the process all leave."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from headwater.lens.records import free_memory as module
from headwater.lens.records.free_memory import free_memory

GB = 10**9


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    class Large:
        available = 24 * GB

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Large)


def group(monkeypatch, tmp_path, own, files):
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(module, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(module, "OWN", tmp_path / "own")


def test_a_group_of_version_2_and_its_parents(monkeypatch, tmp_path):
    files = {
        "job/memory.max": str(5 * GB), "job/memory.current": str(2 * GB), "job/memory.stat": "anon 3\n",
        "job/step/memory.max": "max", "job/step/memory.current": "7",
    }  # fmt: skip
    group(monkeypatch, tmp_path, "0::/job/step\n", files)
    assert free_memory() == 3 * GB
    (tmp_path / "cgroup/job/memory.stat").write_text(f"inactive_file {GB}\n")
    assert free_memory() == 4 * GB, "what files keep in memory is given back"


def test_a_container_sees_its_group_at_the_top(monkeypatch, tmp_path):
    files = {"memory.max": str(GB), "memory.current": str(GB // 4)}
    group(monkeypatch, tmp_path, "0::/not/mounted/here\n", files)
    assert free_memory() == GB - GB // 4


def test_a_group_of_version_1(monkeypatch, tmp_path):
    files = {
        "memory/a/memory.limit_in_bytes": str(2 * GB), "memory/a/memory.usage_in_bytes": str(GB),
        "memory/a/memory.stat": f"total_inactive_file {GB // 2}\n",
        "memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": str(9 * GB),
    }  # fmt: skip
    group(monkeypatch, tmp_path, "4:memory:/a\n3:cpu,cpuacct:/\n", files)
    assert free_memory() == GB + GB // 2


def test_without_groups_it_is_the_machine(monkeypatch, tmp_path):
    group(monkeypatch, tmp_path, "nonsense\n", {})
    assert free_memory() == 24 * GB


@pytest.mark.slow
def test_a_limited_process_is_refused_and_not_killed():
    code = (
        "import resource, torch, headwater as hw\n"
        "model = hw.load('tasks-4l')\n"
        "import psutil\n"
        "room = psutil.Process().memory_info().vms + 40_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    model.record(torch.full((64, 120), 5), keep=('qkv',))\n"
        "except hw.HeadwaterError as error:\n"
        "    print('refused', error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.startswith("refused the record would keep"), run.stderr[-500:]
