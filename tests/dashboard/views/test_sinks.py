"""The page Sinks: shares with their few queries, rules, norms, what is carried, generation, the edit, the family."""

from __future__ import annotations

import json

import numpy as np
import pytest
from opened_app import figure, opened, values

import headwater as hw
from headwater.dashboard.running import runs, sinks
from headwater.dashboard.state.state import State

PROMPT = "When Mary and John went to the store , John gave a drink to"
REDISTRIBUTE = {
    "edit": "Redistribute",
    "keys": [0],
    "keep": 0.2,
    "to": "others",
    "heads": "all",
    "layers": "all",
}


def share_of(model: hw.HookedModel, text: str = PROMPT) -> np.ndarray:
    """By hand: the mean weight on each key over the queries that see it, [layer, head, key]."""
    record = model.record(text)
    maps = np.stack([record.pattern(layer)[0].double().numpy() for layer in record.layers])
    return maps.sum(-2) / np.arange(maps.shape[-1], 0, -1)


@pytest.mark.usefixtures("offered")
class TestOfTheSmallModel:
    def test_the_map_is_the_mean_share_and_leaves_out_what_few_see(self, small_model):
        app = opened("sinks", prompt=PROMPT)
        assert not app.error
        drawn = values(figure(app, "sink-map")["data"][0], "z")
        wanted = share_of(hw.load(small_model)).mean(1)
        assert np.allclose(drawn[:, :8], wanted[:, :8], atol=1e-6)  # 8 of 15 queries see token 7
        assert np.isnan(drawn[:, 8:]).all()
        assert any("7 tokens that fewer than 8" in caption.value for caption in app.caption)

    def test_one_button_redistributes_in_exactly_the_heads_above_the_limit(self, small_model):
        app = opened("sinks", prompt=PROMPT, **{"sinks.keys": "[1, 2]", "sinks.limit": "0.15"})
        share = share_of(hw.load(small_model))[:, :, [1, 2]].max(-1)
        wanted = [f"{i}.{j}" for i, j in np.argwhere(share > 0.15)]
        assert 0 < len(wanted) < 12
        app.button(key="redistribute").click().run()
        (edit,) = app.session_state["headwater"].edits
        assert edit["keys"] == [1, 2]
        assert edit["heads"] == wanted
        assert edit["keep"] == 0.4
        assert app.session_state["headwater"].shown == "b"
        assert app.header[0].value == "Edit"

    def test_run_b_and_the_difference_show_the_sinks_after_the_edit(self, small_model):
        model = hw.load(small_model)
        before = share_of(model).mean(1)
        with model.edit(hw.Redistribute(keys=[0], keep=0.2)):
            after = share_of(model).mean(1)
        assert abs(after - before)[:, 0].max() > 0.01
        for shown, wanted in (("b", after), ("difference", after - before)):
            app = opened("sinks", prompt=PROMPT, shown=shown, edits=json.dumps([REDISTRIBUTE]))
            drawn = values(figure(app, "sink-map")["data"][0], "z")
            assert np.allclose(drawn[:, :8], wanted[:, :8], atol=1e-6)

    def test_another_text_stands_at_the_tokens_that_belong_together(self, small_model):
        other = "When John and <unk> <unk> John went to the store , John gave a drink to"
        model = hw.load(small_model)
        one, two = share_of(model), share_of(model, other)
        places = [*range(4), *range(6, 17)]  # of the tokens of A in B
        wanted = two.mean(1)[:, places] - one.mean(1)
        app = opened("sinks", prompt=PROMPT, b_prompt=other, shown="difference")
        drawn = values(figure(app, "sink-map")["data"][0], "z")
        assert np.allclose(drawn[:, :8], wanted[:, :8], atol=1e-6)
        gone = opened("sinks", prompt=PROMPT, b_prompt="When Mary", shown="difference")
        drawn = values(figure(gone, "sink-map")["data"][0], "z")
        assert np.isfinite(drawn[:, 0]).all()
        assert np.isnan(drawn[:, 1:]).all()

    def test_rules_norms_and_what_is_carried_are_the_library_s(self, small_model):
        state = State(model="small", text=PROMPT)
        run, model = runs.a(state), hw.load(small_model)
        found = sinks.recorded(state, run, [0], 0.3, 8)
        record = model.record(PROMPT, keep=("qkv", "residual"))
        assert set(found.rules) <= set(sinks.RULES)
        for rule in found.rules:
            wanted = hw.analyses.find_sinks(record, rule=rule, min_queries=8)["heads"].values[0]
            assert np.allclose(found.rules[rule], wanted, equal_nan=True)
        assert found.norms is not None
        assert found.norms.equals(hw.analyses.sink_norms(record, keys=[0]))
        carried = sinks.contribution(state, run, [0])["share"]
        wanted = hw.analyses.sink_contribution(model, [PROMPT], keys=[0], draws=10)["share"]
        assert np.allclose(carried, wanted, equal_nan=True)

    def test_over_generated_text_each_token_s_weight_on_the_sink(self, small_model):
        state = State(model="small", text=PROMPT)
        found = sinks.generated(state, runs.a(state), [0], 4)
        model = hw.load(small_model)
        ids = model.to_tokens(PROMPT)
        whole = model.generate(ids, max_new_tokens=4)
        record = model.record(whole)
        wanted = np.stack([record.pattern(layer)[0, :, :, 0].mean(0).numpy() for layer in record.layers])
        assert found.first == 15
        assert np.allclose(
            found.mass.values[:, :18], wanted[:, :18], atol=1e-5
        )  # the last one has not looked

    def test_limit_and_least_are_settings_of_the_state(self):
        app = opened("sinks", prompt=PROMPT, **{"sinks.limit": "0.5", "sinks.least": "3"})
        assert app.slider(key="bound-sinks-limit").value == 0.5
        drawn = values(figure(app, "sink-map")["data"][0], "z")
        assert np.isfinite(drawn).all(0).sum() == 13


def test_the_small_sink_models_are_compared_by_their_own_rates(monkeypatch):
    assert len(sinks.family()) == 6
    monkeypatch.setattr(sinks, "family", lambda: ["sink-2l-softmax", "sink-2l-softmax1"])
    found = sinks.compared(sinks.FAMILY_TEXT, 0.3).set_index("model")
    model = hw.load("sink-2l-softmax1")
    wanted = hw.analyses.sink_rate(model.record(sinks.FAMILY_TEXT))
    assert found.loc["softmax1", "sink rate"] == pytest.approx(float(wanted.sink_rate))
    assert found.loc["softmax1", "row sum"] < 0.99 < found.loc["softmax", "row sum"]
    assert sinks.family_text(PROMPT) == sinks.FAMILY_TEXT
    assert sinks.family_text("red cat and cat") == "red cat and cat"


def test_a_model_of_pictures_has_sinks_among_its_patches():
    app = opened("sinks", model="vit-digits")
    assert not app.error
    assert not app.exception
    record = hw.load("vit-digits")
    drawn = values(figure(app, "sink-map")["data"][0], "z")
    assert drawn.shape == (record.n_layers, 17)
    assert np.isfinite(drawn).all()
