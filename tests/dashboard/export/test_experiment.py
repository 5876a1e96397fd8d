"""A view as an experiment: saved, run again here and by the command, taken away, opened; no hub is ever asked."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
from opened_app import opened

from headwater.dashboard.export import experiment, saved
from headwater.dashboard.running import inputs, measure, models, runs
from headwater.dashboard.state import workspace
from headwater.dashboard.state.address import to_address
from headwater.dashboard.state.state import State
from headwater.lens.errors import ExperimentError
from headwater.lens.experiments.run_file import run_file
from headwater.lens.models import embedded

EDIT = {"edit": "Redistribute", "keys": [0], "keep": 0.1, "to": "others", "heads": "all", "layers": "all"}
ABLATE = {
    "edit": "AblateHeads",
    "heads": ["0.1"],
    "ablation": "zero",
    "examples": None,
    "seed": 0,
    "layers": "all",
}


def kept(state: State) -> saved.Saved:
    chosen = measure.of(state, runs.a(state))
    return saved.opened(saved.save(state, to_address(state), "words", chosen))


@pytest.mark.usefixtures("offered")
def test_a_folder_of_ones_own_is_named_by_its_path_and_verified_by_the_first_run(tmp_path, small_model):
    state = State(model="small", text=inputs.DEFAULT_TEXT, edits=[EDIT])
    found = kept(state)
    assert found.state == "agrees with the page"
    with zipfile.ZipFile(io.BytesIO(experiment.archive(saved.files(found, state)))) as archive:
        archive.extractall(tmp_path)
    assert json.loads((tmp_path / experiment.FILE).read_text())["model"] == small_model
    with pytest.raises(ExperimentError, match="--model FOLDER"):  # a hub is never asked
        run_file(tmp_path / experiment.FILE)
    outcome = run_file(tmp_path / experiment.FILE, models.resident("small"))
    assert outcome.verified
    assert outcome.largest < 1e-6
    assert found.values[1] == pytest.approx(
        json.loads(found.results)["results"][0]["after"]["logit_difference"], abs=1e-6
    )


@pytest.mark.parametrize("name", ["vit-digits", "vlm-digits", "clip-digits", "honest-2l"])
def test_every_kind_of_model_is_saved_and_verified(name, monkeypatch):
    monkeypatch.setattr(models, "embedded", embedded.embedded)
    state = State(model=name, edits=[ABLATE])
    inputs.fill(state, models.resident(name))
    found = kept(state)
    # two towers: an experiment states their loss, the page the similarity
    assert found.state.startswith("not compared" if name == "clip-digits" else "agrees with the page")
    assert saved.verify(found, state).startswith("agrees")


@pytest.mark.usefixtures("offered")
def test_results_that_were_changed_are_not_agreed_with():
    state = State(model="small", text=inputs.DEFAULT_TEXT, edits=[EDIT])
    found = kept(state)
    other = State(model="small", text=inputs.DEFAULT_TEXT, edits=[EDIT | {"keep": 0.5}])
    wrong = saved.Saved(**{**vars(found), "experiment": kept(other).experiment})
    with pytest.raises(ExperimentError, match="another version"):
        saved.verify(wrong, state)


@pytest.mark.usefixtures("offered")
def test_the_page_saves_lists_verifies_and_forgets():
    app = opened("experiments", edits=json.dumps([EDIT]))
    app.button(key="save-run").click().run()
    assert [each.value for each in app.success] == ["Saved."]
    (name,) = saved.everything()
    app.session_state["saved-table"] = {"selection": {"rows": [0], "columns": [], "cells": []}}
    app.run()
    app.button(key=f"verify-{name}").click().run()
    assert any("Agrees" in each.value for each in app.text), [each.value for each in app.text]
    app.button(key=f"delete-{name}").click().run()
    assert not saved.everything()


@pytest.mark.usefixtures("offered")
def test_an_experiment_is_opened_and_a_foreign_one_told():
    state = State(model="small", text=inputs.DEFAULT_TEXT, edits=[EDIT], layer=1, head=2, answer=5, wrong=3)
    chosen = measure.of(state, runs.a(state))
    text = experiment.as_experiment(state, chosen).to_json()
    fresh = State(model="small")
    experiment.take(text, fresh)
    assert (fresh.text, fresh.edits, fresh.layer, fresh.head) == (state.text, [EDIT], 1, 2)
    assert measure.of(fresh, runs.a(fresh)).label == chosen.label
    for changed, word in (('"model": "gone"', "not offered"), ('"format": 7', "format")):
        foreign = json.loads(text) | json.loads("{" + changed + "}")
        with pytest.raises(ExperimentError, match=word):
            experiment.take(json.dumps(foreign), fresh)


@pytest.mark.usefixtures("offered")
def test_another_model_in_run_b_is_told():
    state = State(model="small", text=inputs.DEFAULT_TEXT, b_model="small")
    with pytest.raises(ExperimentError, match="one model"):
        experiment.as_experiment(state, measure.of(state, runs.a(state)))


@pytest.mark.usefixtures("offered")
def test_a_run_saved_with_other_weights_is_told_and_not_run():
    state = State(model="small", text=inputs.DEFAULT_TEXT)
    found = kept(state)
    given = json.loads(found.experiment) | {"revision": "model-sha256:" + "0" * 64}
    other = saved.Saved(**{**vars(found), "experiment": json.dumps(given)})
    assert saved.verify(found, state).startswith("agrees")
    assert "the weights of small are others" in saved.verify(other, state)


@pytest.mark.usefixtures("offered")
def test_files_of_another_shape_in_the_folder_of_saved_runs_are_no_saved_runs():
    state = State(model="small", text=inputs.DEFAULT_TEXT)
    good = vars(kept(state))
    wrong = [
        {"values": None}, {"values": ["x", 1]}, {"values": [1.0]}, {"gap": "x"}, {"gap": True}, {"saved": 1e300},
        {"address": {"model": 5}}, {"address": []}, {"words": [1]}, {"experiment": "{"}, {"experiment": 5},
        {"results": None}, {"more": 1},
    ]  # fmt: skip
    for changed in wrong:
        name = workspace.keep("runs", json.dumps(good | changed).encode())
        assert saved.opened(name) is None, changed
    app = opened("experiments")
    assert len(next(each for each in app.dataframe).value) == 1


@pytest.mark.parametrize("measures", [[[]], [{}], [None], [5]])
def test_a_file_whose_measures_are_no_names_is_told(measures):
    text = json.dumps({"model": "small", "prompts": ["Mary"], "measures": measures})
    with pytest.raises(ExperimentError, match="unknown measure"):
        experiment.take(text, State(model="small"))
