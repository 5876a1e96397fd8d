"""The page Catalogue: every analysis by question, a form from its settings, the library's result on the input."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest
from opened_app import opened

import headwater as hw
from headwater.analyses._catalogue.about import listed
from headwater.analyses._catalogue.catalogue import catalogue as every, entry
from headwater.dashboard.parts.catalogue import setting_name
from headwater.dashboard.running import catalogue, measure, runs
from headwater.dashboard.state.address import SETTING
from headwater.dashboard.state.state import State
from headwater.lens.errors import AnalysisError

PROMPT = "When Mary and John went to the store , John gave a drink to"


def settled(app):
    """The page once its jobs have ended."""
    for _ in range(200):
        if not any(button.label == "Cancel" for button in app.button):
            return app
        time.sleep(0.05)
        app.run()
    raise AssertionError("the jobs of the page do not end")


def ran(app):
    app.button(key="run-analysis").click().run()
    settled(app)
    assert not app.exception
    return app


def test_each_analysis_stands_under_one_question():
    names = [each.name for rows in catalogue.by_question().values() for each in rows]
    assert sorted(names) == sorted(listed())


def test_a_search_keeps_what_says_all_of_its_words():
    found = {each.name for rows in catalogue.by_question("rollout abnar").values() for each in rows}
    assert "rollout" in found
    assert found == {
        name
        for name, each in listed().items()
        if "rollout" in f"{name} {each.question} {each.unit} {each.paper}".lower()
        and "abnar" in f"{name} {each.question} {each.unit} {each.paper}".lower()
    }


def test_every_setting_has_a_name_that_an_address_takes():
    for name, asked in every().items():
        for setting in asked.settings:
            assert re.fullmatch(SETTING, setting_name(name, setting.name))


def test_what_is_typed_becomes_the_settings_of_a_call():
    asked = entry("raw_attention")
    first = {setting.name: setting.default for setting in catalogue.fields(asked)}
    typed = first | {"queries": "0 -1", "layers": "all", "keys": ""}
    assert catalogue.read(asked, typed, {}) == {"queries": [0, -1], "layers": "all"}
    with pytest.raises(AnalysisError, match="queries"):
        catalogue.read(asked, first | {"queries": "a"}, {})
    with pytest.raises(AnalysisError, match="words is missing"):
        catalogue.read(entry("word_ranks"), {"words": " "}, {})


def test_a_setting_that_names_a_file_has_no_field():
    names = [setting.name for setting in catalogue.fields(entry("redistribution_study"))]
    assert "resume" not in names
    assert "keep" in names
    assert "masks" not in [setting.name for setting in catalogue.fields(entry("segmentation"))]


def test_a_text_that_could_name_a_file_is_a_list_of_texts(tmp_path):
    """The library opens a file for a text, and takes those of a list as they are."""
    (secret := tmp_path / "secret.txt").write_text("a secret")
    asked = entry("text_heatmap")
    typed = {setting.name: setting.default for setting in catalogue.fields(asked)}
    for given in ({"texts": str(secret)}, {"texts": f"{secret} | a cat"}):
        read = catalogue.read(asked, typed | given, {})
        assert read["texts"] == given["texts"].split(" | ")
        assert catalogue.read(asked, catalogue.typed(asked, read), read) == read


@pytest.mark.usefixtures("offered")
class TestOfTheSmallModel:
    def test_a_record_analysis_gives_the_library_s_numbers(self, small_model):
        more = {
            "catalogue.analysis": "rollout",
            "catalogue.rollout_queries": "3",
            "catalogue.rollout_heads": "max",
        }
        app = ran(opened("catalogue", prompt=PROMPT, **more))
        assert not app.error
        wanted = hw.analyses.rollout(hw.load(small_model).record(PROMPT), queries=[3], heads="max")
        assert np.allclose(app.dataframe[-1].value["value"], wanted.values.ravel(), atol=1e-6)

    def test_an_analysis_of_an_answer_is_of_the_measure(self, small_model):
        app = ran(opened("catalogue", prompt=PROMPT, **{"catalogue.analysis": "input_x_gradient"}))
        state = State(model="small", text=PROMPT)
        asked = measure.of(state, runs.a(state)).settings
        wanted = hw.analyses.input_x_gradient(hw.load(small_model), [PROMPT], **asked)
        assert np.allclose(app.dataframe[-1].value["value"], wanted.values.ravel(), atol=1e-6)

    def test_a_loss_is_the_negated_measure(self, small_model):
        address = {"catalogue.analysis": "head_importance", "catalogue.head_importance_how": "ablation"}
        app = ran(opened("catalogue", prompt=PROMPT, **address))
        state = State(model="small", text=PROMPT)
        chosen = measure.of(state, runs.a(state))
        model = hw.load(small_model)
        with model.edit(hw.AblateHeads("1.2")):
            known = model(PROMPT)[0, -1].double().log_softmax(-1)
        fall = chosen.value(runs.a(state)) - float(known[chosen.answer] - known[chosen.wrong])
        table = app.dataframe[-1].value
        assert table[(table["layer"] == 1) & (table["head"] == 2)]["value"].item() == pytest.approx(
            fall, abs=1e-4
        )

    def test_edits_of_run_b_are_in_force(self, small_model):
        edit = {"edit": "AblateHeads", "heads": ["0.1"]}
        address = {"catalogue.analysis": "logit_lens", "edits": json.dumps([edit]), "shown": "b"}
        app = ran(opened("catalogue", prompt=PROMPT, **address))
        state = State(model="small", text=PROMPT)
        chosen = measure.of(state, runs.a(state))
        asked = entry("logit_lens")
        model = hw.load(small_model)
        with model.edit(hw.AblateHeads("0.1")):
            wanted = asked.function(model, [PROMPT], **chosen.fitting(asked))
        assert len(app.dataframe[-1].value) == len(catalogue.table(wanted))
        assert np.allclose(
            app.dataframe[-1].value["value"].astype(float), catalogue.table(wanted)["value"], equal_nan=True
        )

    def test_a_wrong_setting_is_one_line(self):
        address = {"catalogue.analysis": "rollout", "catalogue.rollout_queries": "x"}
        app = opened("catalogue", prompt=PROMPT, **address)
        assert len(app.error) == 1
        assert "queries" in app.error[0].value

    def test_a_pin_is_kept_in_the_address_and_opens_its_form(self):
        address = {"catalogue.analysis": "rollout", "catalogue.rollout_residual": "0.25"}
        app = opened("catalogue", prompt=PROMPT, **address)
        app.button(key="pin-result").click().run()
        pins = [{"analysis": "rollout", "settings": {"residual": 0.25}}]
        assert app.session_state["headwater"].settings["catalogue.pins"] == pins
        app.button(key="all-analyses").click().run()
        app.button(key="open-pin-0").click().run()
        assert app.number_input(key="bound-catalogue-rollout_residual").value == 0.25
        app.button(key="unpin-0").click().run()
        assert app.session_state["headwater"].settings["catalogue.pins"] == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tasks-4l", "honest-2l", "vit-digits", "clip-digits", "vlm-digits"])
def test_every_form_opens(model):
    app = opened("catalogue", model=model)
    for name in listed():
        app.session_state["headwater"].put("catalogue.analysis", name)
        app.run()
        assert not app.exception, name
        assert entry(name).question in [each.value.replace("\\", "") for each in app.subheader], name
        assert all("needed" in each.value or "missing" in each.value for each in app.error), name
