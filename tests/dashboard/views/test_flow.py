"""The page Flow: each method's numbers, whether the answer depends on them, agreement, paths, the second run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from opened_app import figure, opened, settled, values

import headwater as hw
from headwater.dashboard.running import flows, measure, runs
from headwater.dashboard.state.state import State
from headwater.lens.examples.sample_pictures import sample_pictures

PROMPT = "When Mary and John went to the store , John gave a drink to"
KNOCKOUT = {"edit": "Knockout", "queries": [14], "keys": [2], "heads": "all", "layers": "all"}
METHODS = json.dumps(["raw_attention", "rollout", "relevance", "input_x_gradient"])


@pytest.mark.usefixtures("offered")
class TestOfTheSmallModel:
    def test_each_strip_is_the_row_of_its_method_over_its_sum(self, small_model):
        app = settled(opened("flow", prompt=PROMPT, query="14", **{"flow.methods": METHODS}))
        assert not app.error
        model = hw.load(small_model)
        state = State(model="small", text=PROMPT)
        asked = measure.of(state, runs.a(state)).settings
        rows = [
            hw.analyses.raw_attention(model.record(PROMPT), queries=[14]).values[0, 0],
            hw.analyses.rollout(model.record(PROMPT), queries=[14]).values[0, 0],
            hw.analyses.relevance(model, PROMPT, queries=[14], **asked).values[0, 0]
            - np.eye(15)[14],  # without itself
            hw.analyses.input_x_gradient(model, PROMPT, **asked).values[0],
        ]
        drawn = values(figure(app, "flow-strips-figure")["data"][0], "z")
        assert np.allclose(drawn, [row / np.abs(row).sum() for row in rows], atol=1e-6)

    def test_curves_and_agreement_are_those_of_the_library(self, small_model):
        app = settled(opened("flow", prompt=PROMPT, query="14", **{"flow.methods": METHODS}))
        state = State(model="small", text=PROMPT)
        run = runs.a(state)
        asked = measure.of(state, run)
        model = hw.load(small_model)
        names = ["raw_attention", "rollout", "input_x_gradient"]
        settings = {**asked.settings, "steps": 10}
        wanted = hw.analyses.faithfulness(model, [PROMPT], names, **settings)
        lines = figure(app, "flow-deletion")["data"]
        drawn = {line["name"]: values(line, "y") for line in lines}
        for name in names:
            one = wanted.deletion.sel(attribution=name).values[0]
            assert np.allclose(drawn[flows.METHODS[name]], one, atol=1e-5)
        assert "random" in drawn
        rows = [flows.of_record(run, "raw_attention", 14, {}), flows.of_record(run, "rollout", 14, {})]
        found = flows.agreement(rows)
        wanted = hw.analyses.agreement(model, [PROMPT], "raw_attention rollout", draws=1)
        assert np.allclose(found.values, wanted["mean"].values)

    def test_run_b_and_the_difference_stand_below_run_a(self, small_model):
        one = json.dumps(["rollout"])
        app = opened(
                "flow", prompt=PROMPT, query="14", shown="difference", edits=json.dumps([KNOCKOUT]),
                **{"flow.methods": one},
            )  # fmt: skip
        drawn = values(figure(app, "flow-strips-figure")["data"][0], "z")
        model = hw.load(small_model)
        before = hw.analyses.rollout(model.record(PROMPT), queries=[14]).values[0, 0]
        with model.edit(hw.Knockout(queries=[14], keys=[2])):
            after = hw.analyses.rollout(model.record(PROMPT), queries=[14]).values[0, 0]
        assert np.allclose(drawn, [before, after, after - before], atol=1e-6)
        assert abs(drawn[2]).max() > 0.01

    def test_another_text_stands_at_the_tokens_that_belong_together(self, small_model):
        other = "When John and John went to the <unk> <unk> store , John gave a drink to"
        app = opened(
            "flow", prompt=PROMPT, b_prompt=other, query="14", shown="difference",
            **{"flow.methods": json.dumps(["rollout"])},
        )  # fmt: skip
        drawn = values(figure(app, "flow-strips-figure")["data"][0], "z")
        model = hw.load(small_model)
        before = hw.analyses.rollout(model.record(PROMPT), queries=[14]).values[0, 0]
        after = hw.analyses.rollout(model.record(other), queries=[16]).values[0, 0]
        after = after[[*range(8), *range(10, 17)]]  # of the tokens of A in B
        assert np.allclose(drawn, [before, after, after - before], atol=1e-6)
        app = opened("flow", prompt=PROMPT, b_prompt="When", query="14", shown="difference")
        assert any("has no token that belongs to" in each.value for each in app.info)

    def test_the_token_is_the_state_s_and_settings_are_the_rollout_s(self, small_model):
        one = json.dumps(["rollout"])
        more = {"flow.methods": one, "flow.heads": "max", "flow.add_residual": "false"}
        app = opened("flow", prompt=PROMPT, query="9", **more)
        assert app.selectbox(key="bound-query").value == 9
        assert app.slider(key="bound-flow-residual").disabled
        record = hw.load(small_model).record(PROMPT)
        wanted = hw.analyses.rollout(record, queries=[9], heads="max", add_residual=False).values[0, 0]
        assert np.allclose(values(figure(app, "flow-strips-figure")["data"][0], "z")[0], wanted, atol=1e-6)

    def test_paths_carry_the_whole_rollout(self):
        state = State(model="small", text=PROMPT)
        run = runs.a(state)
        found = flows.paths(run, 14, 0.0, {"residual": 0.3})
        wanted = hw.analyses.rollout(run.record, queries=[14], residual=0.3).values[0, 0]
        assert np.allclose(found.mass[0], wanted, atol=1e-6)
        assert np.allclose(np.bincount(found.edges["depth"], found.edges["share"])[1:], 1)
        edge = found.edges.iloc[0]
        layer, query, key = int(edge["layer"]), int(edge["query"]), int(edge["key"])
        heads = flows.heads_of_edge(run, layer, query, key)
        assert np.allclose(heads, run.record.pattern(layer)[0, :, query, key])

    def test_an_edge_opens_its_heads(self):
        app = settled(
            opened(
                "flow",
                prompt=PROMPT,
                query="14",
                **{"flow.methods": '["rollout"]', "flow.edge": "[3, 14, 14]"},
            )
        )
        names = [button.label for button in app.button if "2\\." in button.label]
        assert len(names) == 4

    def test_methods_of_an_answer_say_that_a_loss_is_none(self):
        app = opened("flow", prompt=PROMPT, kind="loss", **{"flow.methods": METHODS})
        assert not app.error
        assert ["explain an answer" in info.value for info in app.info] == [True]


@pytest.mark.parametrize("name", ["vit-digits", "vlm-digits"])
def test_shares_of_patches_lie_over_the_picture(name):
    app = opened("flow", model=name, **{"flow.methods": '["raw_attention", "rollout"]'})
    assert not app.error
    assert not app.exception
    drawn = figure(app, "flow-picture")["data"]
    assert [trace["type"] for trace in drawn] == ["image", "heatmap", "scatter"] * 2
    model = hw.load(name)
    sample = next(iter(sample_pictures(name).values()))
    record = model.record(model.to_tokens(sample))
    query = 0 if name == "vit-digits" else record.tokens.shape[1] - 1
    row = hw.analyses.rollout(record, queries=[query])[0, 0]
    patches = row.values[row.key_row.values >= 0]
    share = patches / row.values.sum()
    assert np.allclose(values(drawn[4], "z").ravel(), share, atol=1e-6)
    words = values(figure(app, "flow-strips-figure")["data"][0], "z")
    assert words.shape[1] == len(row) - len(patches)
