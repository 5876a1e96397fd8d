"""The page Start: its answers are those of the pages that it leads to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from canvas_events import header_of, send
from opened_app import opened

import headwater as hw
from headwater.dashboard.running import glance, measure, models, runs
from headwater.dashboard.state.state import State
from headwater.lens.models import embedded

PROMPT = "When Mary and John went to the store , John gave a drink to"


@pytest.fixture
def shipped(monkeypatch) -> None:
    monkeypatch.setattr(models, "embedded", embedded.embedded)


@pytest.mark.usefixtures("shipped")
def test_the_sink_is_that_of_the_page_sinks_and_its_redistribution_is_run():
    state = State(model="tasks-4l", text=PROMPT)
    sink = glance.sink(runs.a(state))
    received = hw.analyses.sink_rate(runs.a(state).record, key=sink.place)["received_share"].values
    assert len(sink.heads) == (received > sink.limit).sum() > 0
    before, after = glance.without(state, sink.edit)
    model = hw.load("tasks-4l")
    chosen = measure.of(state, runs.a(state))
    with model.edit(hw.Redistribute(keys=[sink.place], keep=0.4, heads=sink.heads)):
        known = model(PROMPT)[0, -1].double().log_softmax(-1)
    assert before == pytest.approx(chosen.value(runs.a(state)))
    assert after == pytest.approx(float(known[chosen.answer] - known[chosen.wrong]), abs=1e-9)


@pytest.mark.usefixtures("shipped")
def test_the_head_that_makes_the_answer_is_named():
    app = opened("start", model="tasks-4l", prompt=PROMPT)
    state = State(model="tasks-4l", text=PROMPT)
    chosen = measure.of(state, runs.a(state))
    effects = hw.analyses.head_importance(hw.load("tasks-4l"), PROMPT, how="ablation", loss=chosen.loss)
    place = np.unravel_index(int(effects.values.argmax()), effects.shape)
    assert tuple(place) == (0, 0)
    said = [each.value.replace("\\", "") for each in app.markdown]
    assert f"Without head 0.0 the measure falls by {float(effects.max()):.3g} nats." in said


@pytest.mark.usefixtures("shipped")
def test_a_click_on_a_head_opens_it_and_no_large_library_is_asked_for():
    app = opened("start", model="tasks-4l", prompt=PROMPT)
    assert header_of(app, "card_heads")["chosen"] == [0, 0]
    for heavy in ("plotly_chart", "arrow_data_frame", "arrow_table"):
        assert not app.get(heavy)
    send(app, "card_heads", {"head": [2, 5]})
    state = app.session_state["headwater"]
    assert (state.layer, state.head) == (2, 5)
    assert "Head 2.5" in [each.value.replace("\\", "") for each in app.header]


def test_the_models_are_listed_with_their_weights_as_words(small_model, offered):
    app = opened("start", model="small")
    (table,) = [each.value for each in app.markdown if each.value.startswith("| model |")]
    size = sum(file.stat().st_size for file in Path(small_model).glob("*.safetensors")) / 1e6
    assert f"| small | {size:.1f} |" in table.splitlines()
