"""docs/edits.md: every edit and recipe has a row, and every line of it runs and changes the model.

Seen to fail with a recipe line that changed nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.edits import EDITS

PAGE = (Path(__file__).parents[3] / "docs" / "edits.md").read_text(encoding="utf-8")
LINES = [line for line in re.findall(r"`(hw\.[^`]+\))` \|$", PAGE, re.MULTILINE) if "…" not in line]


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_page_runs(line):
    model = hw.load(tiny_models.tiny("llama"))
    prompt = torch.tensor([[1, 20, 33, 5, 34, 35, 20]])
    record = model.record(prompt.flip(1))
    known = {"hw": hw, "torch": torch, "model": model, "record": record, "prompt": prompt, "without": prompt[:, 4:],
             "v": torch.ones(8), "d": torch.linspace(-1, 2, 32)}  # fmt: skip
    made = eval(line, known)
    edits = made if isinstance(made, list) else [made]
    with model.edit(*edits):
        edited = model(prompt)
    removes = any(isinstance(edit, hw.PruneTokens) for edit in edits)
    kept = edited[:, -1] if removes else edited  # removed tokens are NaN
    assert kept.isfinite().all()
    assert not edited.equal(model(prompt))


def test_every_edit_and_recipe_has_a_row():
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    inside = {"calibration_heads", "guided", "massive_dimensions", "outlier_patches", "visual_sensitivity"}
    assert rows == set(EDITS) | (set(hw.recipes.__all__) - inside)
    others = re.findall(
        r"^\| `\w+` \|.*`[^`]*…[^`]*` \|$", PAGE, re.MULTILINE
    )  # models that read or make images
    assert len(LINES) + len(others) == len(rows)
