"""The worked examples of docs/extending.md, put into a copy of the source as the page says, and run.

Seen to fail with an edit that is in no `__all__`, and with a backend in no file of its folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import doctest, torch, headwater as hw
from headwater import analyses
from headwater.kernels.attend import attend
from headwater.kernels.edits.scores import CapScores
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.errors import AnalysisError

torch.manual_seed(0)
q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
heads = torch.tensor([True, False, True, False])
capped = ScoreRule(1.0, Mask(9, 9, right=0), edits=(CapScores(heads, 0.5),))
for rule in (capped, ScoreRule(1.0, Mask(9, 9, right=0))):
    wanted, dense = attend(q, k, v, rule, backend="reference")
    for backend in ("auto", "blocked", "whole"):
        z, map = attend(q, k, v, rule, backend=backend)
        torch.testing.assert_close(z, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(map @ v.repeat_interleave(2, 1), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(map.statistic("entropy"), dense.statistic("entropy"), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(map.at(torch.zeros(2, 4, 9, 1).long()), dense.dense()[..., :1])
try:
    attend(q, k, v, capped, backend="flash")
except ValueError as error:
    print(error)

model = hw.load("tasks-4l")
edit = hw.CapScores(0.5, heads="1.3")
assert hw.edit_from_dict(edit.to_dict()) == edit
with model.edit(edit):
    record = model.record("Mary gave John a drink")
record.save("run.safetensors")
again = hw.Record.open("run.safetensors", verify=True)
assert torch.equal(again.map(1).dense(), record.map(1).dense())
found = analyses.first_key_share(again, skip=2)
for public in (hw.CapScores, analyses.first_key_share):
    example, = doctest.DocTestFinder().find(public, public.__name__, globs={})[:1]
    assert example.examples and not doctest.DocTestRunner().run(example).failed
assert found.attrs["skip"] == 2 and "CapScores" in found.attrs["edits"]
try:
    analyses.first_key_share(again, skip=-1)
except AnalysisError as error:
    print(error)
"""


def put(root: Path) -> None:
    """Follow the page: new files are written, other blocks go where their sentence says."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^`([\w/]+\.py)`([^\n]*)\n\n```python\n(.*?)```", page, re.M | re.S)
    assert len(blocks) == 5
    for name, told, code in blocks:
        path = root / name
        if "a new file" in told:
            assert not path.exists()
            path.write_text(code, encoding="utf-8")
            continue
        text = path.read_text(encoding="utf-8")
        if name == "kernels/edits/scores.py":
            above, _, union = text.partition("PlainScoreEdit = ")
            union, _, below = union.partition("\n")
            text = f"{above}{code}\n\nPlainScoreEdit = {union} | CapScores\n{below}"
        elif name == "kernels/reference/dense.py":
            place = '    """One score edit on every head."""\n'
            assert place in text
            text = text.replace(place, place + code).replace(
                "    BlockScores,\n", "    BlockScores,\n    CapScores,\n", 1
            )
        else:
            text = (
                re.sub(r"^__all__ = \[", '__all__ = ["CapScores", ', text, count=1, flags=re.M)
                + "\n\n"
                + code
            )
        path.write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_the_worked_examples(tmp_path: Path) -> None:
    for name in ("kernels", "lens", "analyses"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "headwater", tmp_path / "headwater", symlinks=True)
    (tmp_path / "data").symlink_to(ROOT / "data")
    put(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    refused, limited = run.stdout.splitlines()
    assert "CapScores" in refused
    assert limited == "skip=-1 is outside its limits; give a whole number from 0"
