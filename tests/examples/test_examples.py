"""Every script in examples/ runs as a user would run it, and says something."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from headwater.lens.trained.registry import is_added

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples"


NEEDS = {"edit_attention_in_an_nnsight_trace": "nnsight", "edit_attention_under_pyvene": "pyvene"}
SCRIPTS = sorted(
    set(FOLDER.glob("[!_]*.py")) - set(FOLDER.glob("vision_*.py"))
)  # tests/test_vision_page.py has them
REAL = [script for script in SCRIPTS if script.stem.startswith("real_")]  # they are run on trained models


def said(script: Path, *arguments: str) -> str:
    """What the script prints; it must end well."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s not in REAL], ids=lambda path: path.stem)
def test_an_example_runs(script):
    needed = NEEDS.get(script.stem)
    if needed and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    assert said(script)
    assert len(script.read_text(encoding="utf-8").splitlines()) < 40


@pytest.mark.page
@pytest.mark.real
@pytest.mark.parametrize("script", REAL, ids=lambda path: path.stem)
def test_an_example_on_a_trained_model_runs_and_keeps_its_findings(script, tmp_path):
    needed = re.search(r'hw\.load\("(.*?)"\)', script.read_text(encoding="utf-8"))
    assert needed
    if not is_added(needed[1]):
        pytest.skip(f"{needed[1]} was not added: headwater models add {needed[1]}")
    assert said(script, str(tmp_path), "--quick")
    kept = json.loads((tmp_path / f"{script.stem}.json").read_text(encoding="utf-8"))
    assert {"model", "revision", "seed", "torch", "machine", "date"} <= set(kept)
    assert "<svg" in (tmp_path / f"{script.stem}.svg").read_text(encoding="utf-8")
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60
