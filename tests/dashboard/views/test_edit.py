"""The page Edit: its list, its form, and what it says of the measure, held to the library called directly."""

from __future__ import annotations

import json

import numpy as np
import pytest
from opened_app import figure, opened, values as values_of

import headwater as hw
from headwater.dashboard.parts import job
from headwater.dashboard.running import bench, edit_kinds
from headwater.lens.edits import EDITS

PROMPT = "When Mary and John went to the store , John gave a drink to"
RULE = '{"kind": "dilated", "reach": 1, "step": 2}'
ABLATE = {"edit": "AblateHeads", "heads": ["0.0"], "ablation": "zero"}
TAKE = {"edit": "Redistribute", "keys": [0], "keep": 0.25, "to": "others", "heads": ["1.2"], "layers": "all"}


@pytest.fixture(autouse=True)
def patient(monkeypatch) -> None:
    """Jobs are waited for."""
    monkeypatch.setattr(job, "PATIENCE", 60.0)


def state_of(app):
    return app.session_state["headwater"]


def said(app) -> str:
    every = [
        each.value for kind in ("markdown", "caption", "warning", "error") for each in getattr(app, kind)
    ]
    return " ".join(every).replace("\\", "")


def metrics(app) -> dict[str, str]:
    return {each.label.replace("\\", ""): each.value for each in app.metric}


def edited(model: hw.HookedModel, prompt: str, *edits) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the next token, plain and edited."""
    found = []
    for chosen in ((), edits):
        with model.edit(*chosen):
            found.append(model(prompt)[0, -1].double().log_softmax(-1).detach().numpy())
    return found[0], found[1]


def test_the_ablated_head_of_the_start_prompt_takes_the_answer_away_and_the_page_says_so_first():
    app = opened("edit", model="tasks-4l", edits=json.dumps([ABLATE]))
    model = hw.load("tasks-4l")
    mary = int(model.to_tokens("Mary").ids[0, -1])
    before, after = edited(model, PROMPT, hw.AblateHeads(["0.0"]))
    assert before[mary] - after[mary] > 13
    shown = list(metrics(app).items())
    assert "‹Mary›" in shown[0][0]
    assert shown[1] == ("log p(‹Mary›)", f"{after[mary]:.4g}")
    assert app.metric[1].delta == f"{after[mary] - before[mary]:+.4g} nats, A {before[mary]:.4g}"
    apart = (np.exp(before) * (before - after)).sum()
    assert metrics(app)["KL(A‖B), nats"] == f"{apart:.3g}"


@pytest.mark.usefixtures("offered")
def test_an_edit_is_switched_moved_made_stronger_and_removed():
    app = opened("edit", prompt=PROMPT, edits=json.dumps([TAKE, ABLATE]))
    assert "75% of what goes to ‹<bos>› → others, head 1.2" in said(app)
    app.slider(key="strength-0").set_value(0.5).run()
    assert state_of(app).edits[0]["keep"] == 0.5
    app.toggle(key="edit-on-1").set_value(False).run()
    assert state_of(app).edits[1]["off"] is True
    assert state_of(app).applied() == [{**TAKE, "keep": 0.5}]
    app.button(key="down-0").click().run()
    assert [edit["edit"] for edit in state_of(app).edits] == ["AblateHeads", "Redistribute"]
    app.button(key="remove-0").click().run()
    assert state_of(app).edits == [{**TAKE, "keep": 0.5}]
    app.button(key="remove-0").click().run()
    assert state_of(app).edits == []
    assert not app.metric


@pytest.mark.usefixtures("offered")
def test_the_form_adds_the_edit_that_it_describes():
    ask = {"edit.kind": "AblateHeads", "edit.needed_by": "pinned", "pins": "2.1,0.3,0.0>2.1"}
    app = opened("edit", prompt=PROMPT, **ask)
    app.button(key="add-edit").click().run()
    (edit,) = state_of(app).edits
    assert hw.edit_from_dict(edit) == hw.AblateHeads(["2.1", "0.3"])
    assert "without heads 2.1, 0.3" in said(app)


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize(
    "kind", ["MoveAttention", "HeadMix", "EditResidual", "Normaliser", "HeavyHitters", "MaskPairs", "recipes"]
)
def test_every_kind_of_edit_under_more_can_be_made(kind):
    more = {
        "edit.kind": "more",
        "edit.more": kind,
        "edit.moveattention_to": "[3]",
        "edit.maskpairs_rule": RULE,
    }
    app = opened("edit", prompt=PROMPT, **more)
    assert not app.exception
    app.button(key="add-edit").click().run()
    assert not app.error
    assert state_of(app).edits
    assert metrics(app)


def test_every_edit_of_the_library_is_here_or_told_why_not():
    assert set(edit_kinds.kinds()) | set(edit_kinds.NOT_HERE) == set(EDITS)
    assert not set(edit_kinds.kinds()) & set(edit_kinds.NOT_HERE)


@pytest.mark.usefixtures("offered")
def test_an_edit_that_does_not_fit_is_told_and_can_be_removed():
    wrong = {**ABLATE, "heads": ["9.9"]}
    app = opened("edit", prompt=PROMPT, edits=json.dumps([wrong]))
    assert "no such head: 9.9" in said(app)
    app.button(key="remove-0").click().run()
    assert state_of(app).edits == []
    assert not app.error


@pytest.mark.usefixtures("offered")
def test_positions_whose_tokens_changed_with_the_text_are_told():
    edit = {**TAKE, "keys": [4]}
    app = opened("edit", prompt=PROMPT, edits=json.dumps([edit]))
    assert "has changed" not in said(app)
    app.text_area(key="bound-text").set_value("When Mary went to the store").run()
    assert "position 4 was ‹John› and is now ‹to›" in said(app)
    app.button(key="meant").click().run()
    assert "has changed" not in said(app)


@pytest.mark.usefixtures("offered")
def test_the_head_shown_is_the_one_whose_attention_moved_most(small_model):
    app = opened("edit", prompt=PROMPT, edits=json.dumps([TAKE]))
    model = hw.load(small_model)
    plain = model.record(PROMPT)
    with model.edit(hw.edit_from_dict(TAKE)):
        after = model.record(PROMPT)
    change = np.stack(
        [(after.pattern(n)[0] - plain.pattern(n)[0]).abs().sum(-1).mean(-1).numpy() / 2 for n in model.layers]
    )
    layer, head = np.unravel_index(change.argmax(), change.shape)
    assert (layer, head) == (1, 2)
    assert f"Most: {layer}.{head} ({change.max():.3g})" in said(app)


@pytest.mark.usefixtures("offered")
def test_controls_are_the_same_edit_at_other_heads(small_model):
    app = opened("edit", prompt=PROMPT, edits=json.dumps([TAKE]), **{"edit.control": "true"})
    model = hw.load(small_model)
    answer, wrong = np.argsort(-edited(model, PROMPT)[0])[:2]

    def change(edit):
        plain, after = edited(model, PROMPT, edit)
        return (after[answer] - after[wrong]) - (plain[answer] - plain[wrong])

    own = change(hw.edit_from_dict(TAKE))
    tries = bench.elsewhere([TAKE], "heads", [f"{n}.{h}" for n in model.layers for h in range(4)], 15)
    others = [change(hw.edit_from_dict(each[0])) for each in tries]
    beyond = sum(abs(each) >= abs(own) for each in others)
    assert f"B changes the measure by {own:+.4g}; {beyond} of 20 controls" in said(app)


def test_a_sweep_is_over_the_prompt_set_that_the_text_belongs_to(monkeypatch):
    monkeypatch.setattr(bench, "OF_A_SET", 2)
    examples = hw.prompt_set("indirect_object", 2)
    edit = {**TAKE, "heads": "all"}
    app = opened(
        "edit",
        model="tasks-4l",
        prompt=examples[0].prompt,
        edits=json.dumps([edit]),
        **{"edit.sweep": "true"},
    )
    assert not app.error
    assert app.selectbox(key="bound-edit-over").value == "indirect_object"
    assert (
        "mean of 2 prompts of indirect_object"
        in figure(app, "edit-sweep")["layout"]["title"]["subtitle"]["text"]
    )
    model, values = hw.load("tasks-4l"), []
    for each in examples:
        right, wrong = (int(model.to_tokens(word).ids[0, -1]) for word in (each.answer, each.wrong[0]))
        with model.edit(hw.edit_from_dict({**edit, "keep": 0.5})):
            values.append(
                float((lambda logits: logits[right] - logits[wrong])(model(each.prompt)[0, -1].detach()))
            )
    (curve,) = [each for each in figure(app, "edit-sweep")["data"] if each.get("mode") == "lines+markers"]
    strengths = values_of(curve, "x")
    assert values_of(curve, "y")[list(strengths).index(0.5)] == pytest.approx(np.mean(values), rel=1e-4)


@pytest.mark.parametrize(
    "model", ["vit-digits", "vlm-digits", pytest.param("clip-digits", marks=pytest.mark.slow)]
)
def test_models_that_see_are_edited_too(model):
    app = opened("edit", model=model, edits=json.dumps([{**ABLATE, "heads": ["1.0"]}]))
    assert not app.error
    assert not app.warning
    change, before = app.metric[0].delta.split(", A ")
    assert float(change.split()[0]) == pytest.approx(float(app.metric[0].value) - float(before), abs=2e-3)
    assert float(change.split()[0]) != 0


@pytest.mark.usefixtures("offered")
def test_the_python_of_the_view_holds_the_edits():
    app = opened("edit", prompt=PROMPT, edits=json.dumps([TAKE]))
    (code,) = [each.value for each in app.code if "hw.load" in each.value]
    assert hw.edit_from_dict(TAKE).to_python() in code
    app.button(key="save-run").click().run()
    (button,) = [each for each in app.get("download_button") if each.proto.label == "Experiment and results"]
    assert button.proto.deferred_file_id
