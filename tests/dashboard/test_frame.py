"""What stands around every page: the model and its input, the measure, runs A and B, history."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from opened_app import opened

import headwater as hw
from headwater.dashboard import pages
from headwater.dashboard.running import measure, models, runs
from headwater.dashboard.state.state import State
from headwater.lens.models import embedded

pytestmark = pytest.mark.usefixtures("offered")
PROMPT = "When Mary and John went to the store , John gave a drink to"
REDISTRIBUTE = {
    "edit": "Redistribute",
    "keys": [0],
    "keep": 0.1,
    "to": "others",
    "heads": "all",
    "layers": "all",
}


@pytest.mark.parametrize("page", list(pages.PAGES))
def test_every_page_opens_without_a_word_of_complaint(page):
    app = opened(page)
    assert not app.error
    assert not app.warning
    assert app.header[0].value


def test_address_sets_prompt_and_head_and_a_page_lets_it_stand():
    app = opened("head", layer="2", head="3", prompt="When John went to the store")
    state = app.session_state["headwater"]
    assert (state.layer, state.head, state.text) == (2, 3, "When John went to the store")
    assert app.text_area(key="bound-text").value == "When John went to the store"


def test_what_an_address_got_wrong_is_told_until_the_person_acts():
    """A job that ends draws the page anew: what was told must not go with it."""
    app = opened("heads", layer="9", answer="99999", kind="joy", prompt="When John went to the store")
    told = [warning.value for warning in app.warning]
    assert [any(word in each for each in told) for word in ("Layer 9", "99999", "joy")] == [True] * 3
    app.run()
    assert sorted(warning.value for warning in app.warning) == sorted(told)
    assert "answer" not in app.query_params
    app.button(key="pin-head").click().run()
    assert not app.warning


def test_an_address_that_the_session_did_not_write_is_read_again():
    app = opened("heads", prompt="When John went to the store")
    app.text_area(key="bound-text").set_value("Mary gave a drink").run()
    assert app.query_params["prompt"] == "Mary gave a drink"
    app.query_params["prompt"] = "When John went to the store"  # as Back does
    app.run()
    assert app.session_state["headwater"].text == "When John went to the store"
    assert app.text_area(key="bound-text").value == "When John went to the store"


def test_another_model_can_be_chosen_and_begins_with_its_own_input(monkeypatch):
    monkeypatch.setattr(models, "embedded", embedded.embedded)
    app = opened("head", model="tasks-4l", layer="3", head="7", edits=json.dumps([REDISTRIBUTE]))
    app.selectbox(key="bound-model").set_value("small").run()
    assert [warning.value[:7] for warning in app.warning] == ["Layer 3", "Head 7 "]
    assert app.session_state["headwater"].edits == []
    app.selectbox(key="bound-model").set_value("vit-digits").run()
    assert not app.exception
    assert not app.error
    assert app.session_state["headwater"].picture == "sample:zero"


def test_the_measure_is_the_difference_of_the_two_likeliest(small_model):
    state = State(model="small", text=PROMPT)
    run = runs.a(state)
    found = measure.of(state, run)
    known = torch.log_softmax(hw.load(small_model)(PROMPT)[0, -1].double(), -1)
    first, second = known.topk(2)[0].tolist()
    assert found.value(run) == pytest.approx(first - second, abs=1e-9)
    state.edits = [REDISTRIBUTE]
    model = hw.load(small_model)
    with model.edit(hw.Redistribute(keys=[0], keep=0.1)):
        after = torch.log_softmax(model(PROMPT)[0, -1].double(), -1)
    ids = known.topk(2).indices
    assert found.value(runs.b(state)) == pytest.approx(float(after[ids[0]] - after[ids[1]]), abs=1e-9)


def test_importance_of_the_measure_is_what_ablation_takes_from_it(small_model):
    state = State(model="small", text=PROMPT)
    found = measure.of(state, runs.a(state))
    model = hw.load(small_model)
    importance = hw.analyses.head_importance(model, PROMPT, how="ablation", loss=found.loss)
    with model.edit(hw.AblateHeads(["1.2"], ablation="zero")):
        after = torch.log_softmax(model(PROMPT)[0, -1].double(), -1)
    difference = float(after[found.answer] - after[found.wrong])
    assert float(importance[1, 2]) == pytest.approx(found.value(runs.a(state)) - difference, abs=1e-4)


@pytest.mark.parametrize("name", ["vit-digits", "vlm-digits", "clip-digits", "video-digits", "honest-2l"])
def test_every_kind_of_model_has_a_measure(name, monkeypatch):
    monkeypatch.setattr(models, "embedded", embedded.embedded)
    app = opened("heads", model=name)
    assert not app.error
    state = app.session_state["headwater"]
    run = runs.a(state)
    assert np.isfinite(measure.of(state, run).value(run))
    for part in run.parts:
        app = opened("heads", model=name, part="" if part == run.parts[0] else part)
        assert not app.error
        assert not app.warning


def test_two_sessions_never_see_each_others_edits():
    one, none = opened("edit", edits=json.dumps([REDISTRIBUTE])), opened("edit")
    assert one.session_state["headwater"].edits == [REDISTRIBUTE]
    assert none.session_state["headwater"].edits == []
    resident = models.resident("small").hf.state_dict()
    again = hw.load(models.source("small")).hf.state_dict()
    assert all(torch.equal(tensor, resident[name]) for name, tensor in again.items())


def test_errors_show_text_and_no_markup():
    from headwater.dashboard.widgets import plain

    assert plain("![x](http://a) $y$ :red[z]") == r"\!\[x\]\(http\:\/\/a\) \$y\$ \:red\[z\]"
