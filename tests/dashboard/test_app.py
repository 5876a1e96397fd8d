"""The app without a browser: state from the address, clicks, bad prompts, edits, and sessions apart from each other."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from opened_app import figure, opened, values

import headwater as hw
from headwater.dashboard import runs, state
from headwater.lens.loading import zoo
from headwater.lens.models import embedded

pytestmark = pytest.mark.usefixtures("offered")
VIEWS = ("overview", "head", "flow", "sinks", "edit")
PROMPT = "When Mary and John went to the store , John gave a drink to"
REDISTRIBUTE = {
    "edit": "Redistribute",
    "keys": [0],
    "keep": 0.1,
    "to": "others",
    "heads": "all",
    "layers": "all",
}


@pytest.mark.parametrize("page", VIEWS)
def test_every_page_opens_without_a_word_of_complaint(page):
    app = opened(page)
    assert not app.error
    assert not app.warning
    assert app.header[0].value


def test_address_sets_prompt_and_head():
    app = opened("head", layer="2", head="3", prompt="When John went to the store")
    assert app.header[0].value == "Head 2.3"
    assert app.text_area[0].value == "When John went to the store"


def test_session_writes_its_address():
    app = opened(layer="1", head="2")
    wanted = {"model": "small", "layer": "1", "head": "2", "prompt": PROMPT}
    assert dict(app.query_params) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "word"),
    [
        ({"layer": "99"}, "Layer 99"),
        ({"head": "7"}, "Head 7"),
        ({"layer": "-1"}, "layer"),
        ({"model": "../x"}, "not offered"),
        ({"prompt_id": "00"}, "no longer held"),
        ({"edits": "[1]"}, "edits"),
        ({"edits": '[{"edit": "Nonsense"}]'}, "Nonsense"),
        ({"edits": '[{"edit": "FreezeAttention", "record": "/etc/passwd"}]'}, "does not open"),
        ({"edits": '[{"edit": "FreezeAttention", "record": "/absent"}]'}, "does not open"),
        ({"edits": '[{"edit": "InjectPattern", "pattern": "/etc/x.safetensors"}]'}, "does not open"),
        ({"head": "٣"}, "head"),
    ],
)
def test_an_address_out_of_range_is_mended_with_a_notice(address, word):
    app = opened(**address)
    assert word in app.warning[0].value.replace("\\", "")
    assert app.selectbox(key="chosen-layer").value in range(3)
    app.run()
    assert not app.warning  # told once


def test_a_long_prompt_is_held_under_its_hash_and_found_again():
    long = " ".join(["When"] * 200)
    app = opened()
    app.text_area[0].set_value(long).run()
    assert "prompt" not in app.query_params
    again = opened(prompt_id=app.query_params["prompt_id"])
    assert again.text_area[0].value == long


def test_held_prompts_are_bounded():
    names = [state.kept(f"prompt {number}") for number in range(state.KEPT_PROMPTS + 1)]
    assert state.recalled(names[0]) is None
    assert state.recalled(names[-1]) == f"prompt {state.KEPT_PROMPTS}"


@pytest.mark.slow
@pytest.mark.parametrize("page", VIEWS)
@pytest.mark.parametrize("prompt", ["   ", " ".join(["When"] * 800)])
def test_a_bad_prompt_is_one_line_and_stays(page, prompt):
    app = opened(page)
    app.text_area[0].set_value(prompt).run()
    assert len(app.error) == 1
    assert "\n" not in app.error[0].value
    assert app.text_area[0].value == prompt
    app.text_area[0].set_value(PROMPT).run()
    assert not app.error


def test_a_prompt_of_one_token_opens_everywhere():
    for page in VIEWS:
        app = opened(page)
        app.text_area[0].set_value("<unk>").run()
        assert not app.exception
        assert not app.error


def test_tokens_that_look_like_markup_open_everywhere():
    for page in VIEWS:
        app = opened(page, prompt="<s> </s> &lt; $x$ **b** =1+1 <s>")
        assert not app.error


def test_overview_shows_every_head_and_the_next_tokens(small_model):
    app = opened()
    heads = figure(app, "heads-0")
    assert values(heads["data"][0], "z").shape == (3, 4)
    model = hw.load(small_model)
    likeliest = torch.softmax(model(PROMPT)[0, -1], -1).max().item()
    assert figure(app, "next")["data"][0]["text"][0] == f"{likeliest:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize("score", ["previous", "entropy", "distance", "induction", "importance", "ablation"])
def test_every_score_of_the_overview_can_be_shown(score):
    app = opened()
    app.selectbox(key="score").set_value(score).run()
    assert not app.exception
    assert np.isfinite(values(figure(app, "heads-0")["data"][0], "z")).any()


def test_another_model_can_be_chosen_and_a_head_it_lacks_is_told(monkeypatch):
    monkeypatch.setattr(runs, "embedded", embedded.embedded)
    app = opened("head", model="tasks-4l", layer="3", head="7")
    app.selectbox(key="chosen-model").set_value("small").run()
    assert [warning.value[:7] for warning in app.warning] == ["Layer 3", "Head 7 "]
    assert app.header[0].value == "Head 2.3"
    app.selectbox(key="chosen-model").set_value("tasks-4l").run()
    assert not app.exception
    assert not app.error


def test_a_click_on_a_head_opens_it():
    app = opened()
    app.session_state["heads-0"] = {
        "selection": {"points": [{"x": 3, "y": 2}], "point_indices": [11], "box": [], "lasso": []}
    }
    app.run()
    assert app.header[0].value == "Head 2.3"
    assert app.selectbox(key="chosen-layer").value == 2
    assert app.query_params["head"] == "3"


def test_head_page_draws_the_exact_map(small_model):
    app = opened("head", layer="1", head="2")
    expected = hw.load(small_model).record(PROMPT).pattern(1, 2)[0].numpy()
    drawn = figure(app, "pattern")
    np.testing.assert_allclose(values(drawn["data"][0], "z"), expected, atol=1e-6)
    received = expected.sum(0) / np.arange(len(expected), 0, -1)
    np.testing.assert_allclose(values(drawn["data"][1], "y"), received, atol=1e-5)


def test_a_long_prompt_is_pooled_and_says_so_and_a_window_of_it_is_exact(small_model):
    long = " ".join(["When Mary and John went to the store ,"] * 66)
    app = opened("head", prompt_id=state.kept(long))
    pooled = figure(app, "pattern")
    weights = hw.load(small_model).record(long).pattern(0, 0)[0].numpy()
    assert weights.shape == (595, 595)
    drawn = values(pooled["data"][0], "z")
    assert drawn.shape == (298, 298)
    assert drawn[100, 3] == pytest.approx(weights[200:202, 6:8].max(), abs=1e-6)
    assert "largest weight of 2 × 2" in pooled["layout"]["title"]["subtitle"]["text"]
    app.slider(key="queries-595").set_value((300, 309))
    app.slider(key="keys-595").set_value((0, 399)).run()
    drawn = values(figure(app, "pattern")["data"][0], "z")
    np.testing.assert_allclose(drawn, weights[300:310, :400], atol=1e-6)
    for page in ("flow", "sinks", "edit"):
        app.switch_page(f"views/{page}.py").run()
        assert not app.exception
        assert not app.error


def test_a_click_on_a_token_follows_that_token(small_model):
    app = opened("flow")
    app.session_state["flow-0"] = {
        "selection": {"points": [{"customdata": 4}], "point_indices": [4], "box": [], "lasso": []}
    }
    app.run()
    expected = hw.analyses.rollout(hw.load(small_model).record(PROMPT), queries=[4]).values[0, 0]
    np.testing.assert_allclose(values(figure(app, "flow-bars")["data"][0], "y"), expected, atol=1e-5)
    assert "token 4" in figure(app, "flow-bars")["layout"]["title"]["text"]


def test_a_click_on_the_token_already_chosen_is_taken_once():
    app = opened("flow")
    app.session_state["flow-0"] = {
        "selection": {"points": [{"customdata": 14}], "point_indices": [14], "box": [], "lasso": []}
    }
    app.run(timeout=120)  # a click taken again and again would never end
    app.selectbox(key="chosen-token").set_value(3).run()
    assert "token 3" in figure(app, "flow-bars")["layout"]["title"]["text"]


def test_sinks_page_counts_as_the_analysis_does(small_model):
    app = opened("sinks")
    rate = float(hw.analyses.sink_rate(hw.load(small_model).record(PROMPT))["sink_rate"])
    assert app.metric[0].value == f"{rate:.1%}"
    for rule in ("gu", "act"):
        app.selectbox(key="sink-rule").set_value(rule).run()
        assert not app.exception


def test_an_edit_changes_the_numbers_as_the_library_does(small_model):
    app = opened("edit")
    assert not app.metric
    app.slider(key="redistribute-keep").set_value(0.1)
    app.button(key="add-edit").click().run()
    model = hw.load(small_model)
    with model.edit(hw.Redistribute(keys=[0], keep=0.1)):
        loss = float(model.loss(PROMPT)[0])
    assert app.metric[0].value == f"{float(model.loss(PROMPT)[0]):.4f}"
    assert app.metric[1].value == f"{loss:.4f}"
    assert json.loads(app.query_params["edits"]) == [REDISTRIBUTE]


def test_the_python_shown_repeats_the_edited_run(small_model):
    app = opened("edit", edits=json.dumps([REDISTRIBUTE]))
    code = next(element.value for element in app.code if "import headwater" in element.value)
    space: dict = {}
    exec(code, space)
    model = hw.load(small_model)
    with model.edit(hw.Redistribute(keys=[0], keep=0.1)):
        expected = model(PROMPT)
    assert torch.equal(space["logits"], expected)


@pytest.mark.parametrize("kind", ["Knockout", "ScaleHeads", "AblateHeads", "TowardIdentity", "Temperature"])
def test_every_kind_of_edit_can_be_added(kind):
    app = opened("edit")
    app.selectbox(key="edit-kind").set_value(kind).run()
    if kind == "Knockout":
        app.multiselect(key="knockout-keys-15").set_value([0, 1]).run()
    if kind in ("ScaleHeads", "AblateHeads"):
        app.multiselect(key=f"{'scale' if kind == 'ScaleHeads' else 'ablate'}-heads").set_value(["1.2"]).run()
    app.button(key="add-edit").click().run()
    assert not app.exception
    assert not app.error
    assert app.metric[2].delta not in ("+0.0000", "-0.0000")


def test_edits_stack_and_can_be_taken_off():
    app = opened("edit", edits=json.dumps([REDISTRIBUTE, {"edit": "Temperature", "tau": 3.0}]))
    both = app.metric[1].value
    app.button(key="remove-1").click().run()
    assert app.metric[1].value != both
    app.button(key="remove-0").click().run()
    assert not app.metric


def test_a_wrong_edit_is_one_line_and_can_be_taken_off():
    wrong = REDISTRIBUTE | {"keys": [40]}
    app = opened("edit", edits=json.dumps([REDISTRIBUTE, wrong]))
    assert len(app.error) == 1
    app.button(key="remove-1").click().run()
    assert not app.error
    assert app.metric[0].value != app.metric[1].value


def test_two_sessions_never_see_each_others_edits(small_model):
    before = {name: tensor.clone() for name, tensor in hw.load(small_model).hf.state_dict().items()}
    one, two, none = (opened("edit") for _ in range(3))
    one.button(key="add-edit").click().run()
    two.selectbox(key="edit-kind").set_value("Temperature").run()
    two.button(key="add-edit").click().run()
    for app in (one, two):
        app.run()
    none.run()
    assert one.metric[0].value == two.metric[0].value
    assert one.metric[1].value != two.metric[1].value
    assert not none.metric
    assert len(one.session_state["headwater"].edits) == len(two.session_state["headwater"].edits) == 1
    resident = runs.resident("small").hf.state_dict()
    assert all(torch.equal(tensor, resident[name]) for name, tensor in before.items())


def test_threads_with_different_edits_on_one_model_stay_apart():
    edits = [[REDISTRIBUTE | {"keep": step / 40}] for step in range(40)]
    together = [None] * len(edits)

    def work(mine: range) -> None:
        for place in mine:
            together[place] = runs.edited_run("small", PROMPT, edits[place]).loss

    threads = [threading.Thread(target=work, args=(range(start, len(edits), 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    model = runs.resident("small")
    for place, edit in enumerate(edits):
        with model.edit(*runs.edits_of(edit)):
            assert together[place] == float(model.loss(PROMPT)[0])


def test_errors_show_text_and_no_markup():
    from headwater.dashboard.widgets import plain

    assert plain("![x](http://a) $y$ :red[z]") == r"\!\[x\]\(http\:\/\/a\) \$y\$ \:red\[z\]"


def test_layers_without_a_map_are_named(small_model, tmp_path):
    hybrid = tmp_path / "hybrid"
    zoo.build("jamba").save_pretrained(hybrid)
    for file in Path(small_model).glob("tokenizer*.json"):
        shutil.copy(file, hybrid)
    runs.allow(str(hybrid))
    app = opened(model="hybrid")
    assert any("JambaMambaMixer" in str(each.value) for each in app.sidebar.caption), [
        each.value for each in app.sidebar.caption
    ]
    assert not any("No map covers" in str(each.value) for each in opened(model="small").sidebar.caption)
