"""Saved records in the place of a model: what they hold is shown, what needs the model says so in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from canvas_events import canvases
from opened_app import opened

import headwater as hw
from headwater.analyses._catalogue.about import listed
from headwater.dashboard import launch, pages
from headwater.dashboard.running import catalogue, flows, measure, models, runs, sinks
from headwater.dashboard.state.state import State
from headwater.lens.errors import EditError, ModelError, RecordError

PROMPT = "When Mary and John went to the store , John gave a drink to"


@pytest.fixture(scope="module")
def files(small_model, tmp_path_factory) -> dict[str, str]:
    """Two records of the small model, the second with an edit."""
    folder, model = tmp_path_factory.mktemp("records"), hw.load(small_model)
    model.record(PROMPT, keep=("qkv", "residual")).save(folder / "plain.safetensors")
    with model.edit(hw.Redistribute([0], 0.2)):
        model.record(PROMPT).save(folder / "edited.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in ("plain", "edited")}


@pytest.fixture
def both(offered, files) -> None:
    for name in ("edited", "plain"):
        models.allow(files[name])


def told(app) -> str:
    every = [each.value for kind in ("info", "caption", "markdown") for each in getattr(app, kind)]
    return " ".join(every).replace("\\", "")


@pytest.mark.parametrize("page", list(pages.PAGES))
def test_every_page_opens_on_a_record(page, both):
    app = opened(
        page,
        model="plain.safetensors",
        **({"catalogue.analysis": "head_importance"} if page == "catalogue" else {}),
    )
    assert not app.error
    assert not app.warning
    assert "the record of a run of small" in told(app).lower()
    if page in ("start", "head", "flow", "sinks", "circuits", "edit", "experiments", "catalogue"):
        assert "needs the model" in told(app)
        app.button(key="open-the-model").click().run()
        assert app.session_state["headwater"].model == "small"
        assert not app.error


def test_what_a_page_shows_of_a_record_is_the_models_own(both, small_model):
    model, state = hw.load(small_model), State("plain.safetensors")
    run = runs.a(state)
    expected = model.record(PROMPT)
    np.testing.assert_allclose(runs.pattern(run, 1, 2), expected.pattern(1, 2)[0].numpy(), atol=1e-7)
    assert run.queries == expected.strings[0]
    chosen = measure.of(state, run)
    assert (chosen.kind, chosen.value(run)) == ("none", None)
    query = len(run.queries) - 1
    found = flows.of_model(state, run, chosen, ("flow",), query, {})["flow"]
    np.testing.assert_allclose(
        found.values, hw.analyses.flow(expected, queries=[query]).values.ravel(), atol=1e-6
    )
    assert flows.methods_at_first(run) == ["raw_attention", "rollout", "flow"]
    rules = sinks.recorded(state, run, [0], 0.3, 8)
    plain = State("small", text=PROMPT)
    same = sinks.recorded(plain, runs.a(plain), [0], 0.3, 8)
    pd.testing.assert_frame_equal(rules.rules, same.rules)


def test_analyses_of_a_record_run_and_the_others_are_not_listed(both):
    state = State("plain.safetensors")
    run = runs.a(state)
    names = {each.name for rows in catalogue.by_question("", run.of_record).values() for each in rows}
    assert names == {each.name for each in listed().values() if each.inputs == "record"}
    app = opened("catalogue", model="plain.safetensors", **{"catalogue.analysis": "sink_rate"})
    app.button(key="run-analysis").click().run()
    assert not app.error


def test_two_records_are_compared(both, files):
    app = opened("compare", model="plain.safetensors", b_model="edited.safetensors")
    assert not app.error
    assert {"A", "B"} <= set(canvases(app))
    app = opened(
        "head", model="plain.safetensors", b_model="edited.safetensors", shown="difference", layer="1"
    )
    assert not app.error
    one, other = (hw.Record.open(files[name]).pattern(1, 0)[0].numpy() for name in ("plain", "edited"))
    assert np.abs(other - one).max() > 0.1
    assert "change" in canvases(app)
    app = opened("heads", model="plain.safetensors", b_model="edited.safetensors", shown="difference")
    assert not app.error
    assert not [each for each in app.info if "no difference" in each.value]


def test_a_record_is_neither_edited_nor_given_another_text(both):
    edits = [{"edit": "AblateHeads", "heads": ["0.0"]}]
    with pytest.raises(EditError, match="which neither edits nor another text change"):
        runs.b(State("plain.safetensors", edits=edits))
    with pytest.raises(ModelError, match="holds no model"):
        runs.model_of(State("plain.safetensors"))
    app = opened("heads", model="plain.safetensors", edits=json.dumps(edits))
    assert "Run B can not be made" in app.warning[0].value


def test_no_address_names_a_file_that_was_not_given(offered, files):
    app = opened("heads", model=files["plain"])
    assert "is not offered here" in app.warning[0].value
    assert app.session_state["headwater"].model == "small"


def test_the_command_opens_records_and_refuses_what_is_none(monkeypatch, files, tmp_path):
    monkeypatch.setattr(models, "_given", {})
    monkeypatch.setattr(
        launch, "_application", lambda *given: type("Served", (), {"run": lambda self, config: None})()
    )
    launch.run([files["plain"], files["edited"]])
    assert models.offered()[:2] == ["plain.safetensors", "edited.safetensors"]
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"no record")
    with pytest.raises(RecordError):
        launch.run(str(wrong))
    again = tmp_path / "plain.safetensors"
    again.write_bytes(Path(files["plain"]).read_bytes())
    models.allow(str(again))
    assert {"plain.safetensors", f"{tmp_path.name}/plain.safetensors"} <= set(models.offered())
