"""The Python that a page offers runs as pasted and prints what the page shows, for every kind of model."""

from __future__ import annotations

import os

import numpy as np
import pytest

import headwater as hw
from headwater.dashboard.export.python import as_python
from headwater.dashboard.running import inputs, measure, models, runs
from headwater.dashboard.state.state import State
from headwater.lens.models import embedded

EDIT = {"edit": "Redistribute", "keys": [0], "keep": 0.1, "to": "others", "heads": "all", "layers": "all"}


def printed(state: State, capsys, tmp_path) -> list[str]:
    """What the code prints, run in another folder."""
    code = as_python(state, measure.of(state, runs.a(state)))
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        exec(code, {})
    finally:
        os.chdir(before)
    return capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize("kind", ["difference", "log_probability", "probability", "loss"])
def test_a_folder_of_ones_own_runs_from_anywhere(kind, capsys, tmp_path):
    state = State(model="small", text=inputs.DEFAULT_TEXT, kind=kind, edits=[EDIT], layer=1, head=2)
    lines = printed(state, capsys, tmp_path)
    chosen = measure.of(state, runs.a(state))
    assert float(lines[0].removeprefix("A: ")) == pytest.approx(chosen.value(runs.a(state)), abs=1e-6)
    assert float(lines[2].removeprefix("B: ")) == pytest.approx(chosen.value(runs.b(state)), abs=1e-6)


@pytest.mark.parametrize("name", ["vit-digits", "vlm-digits", "clip-digits", "honest-2l", "video-digits"])
def test_every_kind_of_model(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "embedded", embedded.embedded)
    edit = {
        "edit": "AblateHeads",
        "heads": ["0.1"],
        "ablation": "zero",
        "examples": None,
        "seed": 0,
        "layers": "all",
    }
    state = State(model=name, edits=[edit])
    inputs.fill(state, models.resident(name))
    lines = printed(state, capsys, tmp_path)
    chosen = measure.of(state, runs.a(state))
    found = [float(line[3:]) for line in lines if line.startswith(("A: ", "B: "))]
    assert found == pytest.approx([chosen.value(runs.a(state)), chosen.value(runs.b(state))], abs=1e-5)


@pytest.mark.usefixtures("offered")
def test_another_text_another_model_and_an_edit_that_is_off(capsys, tmp_path):
    state = State(
        model="small",
        text=inputs.DEFAULT_TEXT,
        b_text="When Mary gave a drink to",
        edits=[EDIT | {"off": True}],
    )
    code = as_python(state, measure.of(state, runs.a(state)))
    assert "Redistribute" not in code
    assert "given_b = 'When Mary gave a drink to'" in code


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize("kind", ["difference", "log_probability", "probability", "loss"])
def test_another_text_of_another_length_is_measured_at_its_own_last_token(kind, capsys, tmp_path):
    state = State(
        model="small", text=inputs.DEFAULT_TEXT, b_text="When Mary gave a drink", kind=kind, edits=[EDIT]
    )
    lines = printed(state, capsys, tmp_path)
    chosen = measure.of(state, runs.a(state))
    found = [float(line[3:]) for line in lines if line.startswith(("A: ", "B: "))]
    assert found == pytest.approx([chosen.value(runs.a(state)), chosen.value(runs.b(state))], abs=1e-6)


@pytest.mark.usefixtures("offered")
def test_hostile_text_stays_text(capsys, tmp_path):
    hostile = "When '); import os; os.system('x') #\n\"\"\" \\"
    state = State(model="small", text=hostile)
    printed(state, capsys, tmp_path)
    model = hw.load(models.source("small"))
    assert np.isfinite(float(model.loss(hostile)[0]))
