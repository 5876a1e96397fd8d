"""Every script in examples/ runs as a user would run it, and says something."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples"


NEEDS = {"edit_attention_in_an_nnsight_trace": "nnsight", "edit_attention_under_pyvene": "pyvene"}


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(script):
    needed = NEEDS.get(script.stem)
    if needed and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert len(script.read_text(encoding="utf-8").splitlines()) < 40
