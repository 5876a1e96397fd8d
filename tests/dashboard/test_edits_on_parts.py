"""Edits of the encoder, of cross-attention, of towers: on every way out of the dashboard they are the library's own."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import sense_folders
from opened_app import opened

import headwater as hw
from headwater.dashboard.export import experiment, saved
from headwater.dashboard.export.python import as_python
from headwater.dashboard.parts.edits import told
from headwater.dashboard.running import edit_kinds, inputs, measure, models, runs
from headwater.dashboard.state.address import from_address, to_address
from headwater.dashboard.state.state import State
from headwater.lens.experiments.run_file import run_file

ABLATE = {"edit": "AblateHeads", "heads": ["0.1"], "ablation": "zero"}
CUT = {"edit": "Knockout", "queries": "all", "keys": [1], "heads": "all", "layers": "all"}


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> str:
    return str(sense_folders.save("t5", tmp_path_factory.mktemp("parts") / "t5"))


@pytest.fixture(autouse=True)
def offered_here(t5, monkeypatch) -> None:
    monkeypatch.setattr(models, "_given", {})
    models.allow(t5)


def state_of(name: str, edits: list[dict], **more) -> State:
    state = State(name, edits=edits, **more)
    if name == "t5":
        state.text, state.decoder = "the cat sat on a mat", "the cat"
    inputs.fill(state, models.resident(name))
    return state


def by_hand(state: State, edits: dict[str, hw.Edit]):
    """The output of the model with an edit on each part, the library called directly."""
    model = models.resident(state.model)
    with contextlib.ExitStack() as stack:
        for part, edit in edits.items():
            stack.enter_context(model.part(part).edit(edit))
        return model(inputs.given(state, model).example).double().numpy()


CASES = [
    ("t5", ("encoder", "cross")),
    ("vlm-digits", ("vision", "text")),
    ("clip-digits", ("vision", "text")),
]


@pytest.mark.parametrize(("name", "parts"), CASES)
def test_each_edit_acts_on_its_part_whichever_is_shown(name, parts):
    edits = [{**edit, "part": part} for edit, part in zip((CUT, ABLATE), parts, strict=True)]
    expected = by_hand(
        state_of(name, []), dict(zip(parts, map(hw.edit_from_dict, (CUT, ABLATE)), strict=True))
    )
    plain = by_hand(state_of(name, []), {})
    assert np.abs(expected - plain).max() > 1e-4
    for part in ("", parts[1]):
        run = runs.b(state_of(name, edits, part="" if part == models.resident(name).part_name else part))
        assert run is not None
        if run.similarity is None:
            np.testing.assert_allclose(run.logits, expected[0, -1], atol=1e-5)
        else:
            scale = models.resident(name).hf.logit_scale.exp().item()
            assert run.similarity == pytest.approx(expected.item() / scale, abs=1e-6)


def test_what_is_said_and_linked_names_the_part(t5):
    state = state_of("t5", [{**CUT, "part": "encoder"}, ABLATE])
    assert told(state, state.edits[0]) == "all tokens can not look at ‹cat›, all heads; encoder"
    assert ";" not in told(state, ABLATE)
    again = from_address(to_address(state), models.offered(), runs.edits_of)
    assert again.edits == state.edits
    assert not again.notices
    wrong = from_address(
        {"model": "t5", "edits": json.dumps([{**CUT, "part": 3}])}, models.offered(), runs.edits_of
    )
    assert "the part of an edit is a name" in wrong.notices[0]


def test_the_python_of_edits_on_parts_prints_what_the_page_shows(capsys):
    edits = [{**CUT, "part": "encoder"}, ABLATE, {**ABLATE, "part": "cross"}]
    state = state_of("t5", edits, part="cross")
    chosen = measure.of(state, runs.a(state))
    exec(as_python(state, chosen), {})
    lines = capsys.readouterr().out.splitlines()
    found = [float(line[3:]) for line in lines if line.startswith(("A: ", "B: "))]
    assert found == pytest.approx([chosen.value(runs.a(state)), chosen.value(runs.b(state))], abs=1e-5)
    assert found[0] != found[1]


@pytest.mark.parametrize("part", ["", "encoder"])
def test_an_experiment_holds_the_part_of_each_edit(part, tmp_path):
    edits = [{**CUT, "part": "encoder"}, {**ABLATE, "part": "cross"}, ABLATE]
    state = state_of("t5", edits, part=part)
    chosen = measure.of(state, runs.a(state))
    found = saved.opened(saved.save(state, to_address(state), "words", chosen))
    assert found is not None
    assert found.state == "agrees with the page"
    again = State("t5")
    experiment.take(found.experiment, again)
    assert again.part == part
    shown, meant = runs.b(again), runs.b(state)
    assert shown is not None
    np.testing.assert_array_equal(shown.logits, meant.logits)
    for name, content in saved.files(found, state).items():
        (tmp_path / name).write_bytes(content)
    assert run_file(tmp_path / experiment.FILE, models.resident("t5")).verified


def test_the_form_makes_an_edit_of_the_part_that_is_shown():
    app = opened("edit", model="t5", prompt="the cat sat on a mat", decoder="the cat", part="encoder")
    assert not app.error
    for kind in edit_kinds.kinds():
        common = kind in edit_kinds.COMMON
        app.session_state["headwater"].settings |= {
            "edit.kind": kind if common else "more", "edit.heads_by": "chosen", "edit.needed_by": "chosen"
        } | ({} if common else {"edit.more": kind})  # fmt: skip
        app.run()
        assert not app.exception, kind
        assert not app.error, kind
        words = " ".join(each.value for each in app.caption).replace("\\", "")
        assert edit_kinds.kinds()[kind].meaning in words
    app.session_state["headwater"].settings |= {"edit.kind": "TowardIdentity"}
    app.run()
    app.button(key="add-edit").click().run()
    (edit,) = app.session_state["headwater"].edits
    assert (edit["edit"], edit["part"]) == ("TowardIdentity", "encoder")
    assert not app.error
    assert app.metric[0].delta


@pytest.mark.parametrize("name", ["clip-digits", "t5"])
def test_the_first_page_takes_the_sink_of_any_part_away(name):
    more = {"prompt": "the cat sat on a mat", "decoder": "the cat"} if name == "t5" else {}
    app = opened("start", model=name, part="encoder" if name == "t5" else "text", **more)
    assert not app.error
    assert "another one" not in " ".join(each.value for each in app.caption)
