"""What stays and what changes when another model or another page is chosen; models and prompts that are offered."""

from __future__ import annotations

import pytest
from opened_app import opened

import headwater as hw
from headwater.dashboard import runs, sidebar, state
from headwater.lens.models import embedded
from headwater.lens.prompts import prompt_set

pytestmark = pytest.mark.usefixtures("offered")
PROMPT = state.DEFAULT_PROMPT


def test_a_prompt_that_nobody_typed_changes_with_the_model(monkeypatch):
    monkeypatch.setattr(runs, "embedded", embedded.embedded)
    monkeypatch.setattr(state, "TRAINED", {"small"})
    app = opened(model="tasks-4l")
    assert app.text_area(key="chosen-prompt").value == state.DEFAULT_PROMPT
    app.selectbox(key="chosen-model").set_value("small").run()
    assert app.text_area(key="chosen-prompt").value == state.WRITTEN_PROMPT
    assert app.query_params["prompt"] == state.WRITTEN_PROMPT
    app.text_area(key="chosen-prompt").set_value("Mary gave a drink").run()
    app.selectbox(key="chosen-model").set_value("tasks-4l").run()
    assert app.text_area(key="chosen-prompt").value == "Mary gave a drink"


def test_example_prompts_are_those_of_the_model(monkeypatch, small_model):
    """Held-out prompts of the tasks that an embedded model learnt; of others what can be drawn from their words."""
    monkeypatch.setattr(runs, "embedded", embedded.embedded)
    app = opened(model="tasks-4l")
    learnt = app.selectbox(key="example-tasks-4l")
    assert "capital 1" in learnt.options
    learnt.set_value("capital 1").run()
    assert app.text_area(key="chosen-prompt").value == prompt_set("capital", 1)[0].prompt
    app.selectbox(key="chosen-model").set_value("small").run()
    assert not app.exception
    texts, drawn = len(sidebar.WRITTEN), prompt_set("indirect_object", 2, model=hw.load(small_model))
    examples = app.selectbox(key="example-small")
    assert tuple(examples.options) == (*sidebar.WRITTEN, *examples.options[texts:])
    examples.set_value("indirect object 2").run()
    assert app.text_area(key="chosen-prompt").value == drawn[1].prompt
    app.selectbox(key="example-small").set_value(sidebar.WRITTEN[0]).run()
    assert app.text_area(key="chosen-prompt").value == sidebar.WRITTEN[0]


def test_added_models_that_read_text_are_offered(monkeypatch):
    monkeypatch.setattr(runs, "is_added", lambda name: True)
    assert runs.offered() == ["small", "smollm2-135m", "minilm"]
    monkeypatch.setattr(runs, "_given", {})
    monkeypatch.setattr(runs, "embedded", embedded.embedded)
    assert runs.offered()[:3] == ["smollm2-135m", "minilm", "tasks-4l"]


def test_the_token_chosen_is_kept_from_page_to_page():
    app = opened("head")
    last = app.selectbox(key="chosen-token").value
    assert last == len(PROMPT.split())
    app.switch_page("views/flow.py").run()
    assert app.selectbox(key="chosen-token").value == last
    app.selectbox(key="chosen-token").set_value(3).run()
    app.switch_page("views/head.py").run()
    assert app.selectbox(key="chosen-token").value == 3
