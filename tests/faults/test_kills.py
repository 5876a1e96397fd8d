"""Processes are killed at random moments of all that is written: nothing is lost, nothing is left half-written.

Seen to fail with files written in place.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kills import WORKS

ROOT = Path(__file__).parents[2]
FEW = 1  # kills of each kind; benchmarks/reliability.py does 20


@pytest.mark.slow
def test_killed_at_random_moments() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "kills.py", "all", str(FEW)],
        capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    kills = {told["name"]: told["kills"] for told in map(json.loads, done.stdout.splitlines())}
    assert kills == dict.fromkeys(WORKS, FEW)
