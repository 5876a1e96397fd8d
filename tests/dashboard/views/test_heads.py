"""The page Heads: its numbers are the library's, and what is done to heads is done in run B."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from canvas_events import header_of, send
from opened_app import opened

import headwater as hw
from headwater.dashboard.parts import job, scores as scores_of_heads
from headwater.dashboard.running import effects, measure, models, runs, scores
from headwater.dashboard.state.state import State
from headwater.lens.models import embedded

PROMPT = "When Mary and John went to the store , John gave a drink to"
QUICK = {"heads.columns": json.dumps(["ablation"])}


@pytest.fixture(autouse=True)
def patient(offered, monkeypatch) -> None:
    monkeypatch.setattr(job, "PATIENCE", 120.0)


def table(app):
    return app.dataframe[-1].value


def difference(model: hw.HookedModel, first: int, second: int) -> float:
    with torch.no_grad():
        known = model(PROMPT)[0, -1].double().log_softmax(-1)
    return float(known[first] - known[second])


def test_heads_are_ranked_by_what_ablation_takes_from_the_measure(small_model):
    app = opened("heads", prompt=PROMPT, **QUICK)
    model, found = hw.load(small_model), table(app)
    ids = model(PROMPT)[0, -1].topk(2).indices.tolist()
    whole, falls = difference(model, *ids), []
    for name in found["head"]:
        with model.edit(hw.AblateHeads([name])):
            falls.append(whole - difference(model, *ids))
    np.testing.assert_allclose(found["ablation"], falls, atol=1e-4)
    assert list(np.abs(falls)) == sorted(np.abs(falls), reverse=True)
    largest = found["head"][0]
    assert header_of(app, "heads_grid")["alt"].split("Largest: ")[1].startswith(largest)
    assert header_of(app, "heads_grid")["signed"]


def test_a_click_chooses_a_head_and_a_shifted_one_pins_it(small_model):
    app = opened("heads", prompt=PROMPT, **QUICK)
    app = send(app, "heads_grid", {"head": [2, 1]})
    state = app.session_state["headwater"]
    assert (state.layer, state.head) == (2, 1)
    app = send(app, "heads_mosaic", {"pin": [1, 3]})
    assert app.session_state["headwater"].pins == ["1.3"]
    assert header_of(app, "heads_grid")["pins"] == [[1, 3]]
    assert not app.exception


@pytest.mark.parametrize(("button", "gone"), [("ablate-pinned", ["1.3"]), ("keep-pinned", None)])
def test_pinned_heads_are_removed_or_kept_alone_in_run_b(small_model, button, gone):
    app = opened("heads", prompt=PROMPT, pins="1.3,0.0>1.3", **QUICK)
    app.button(key=button).click().run()
    state = app.session_state["headwater"]
    every = [f"{layer}.{head}" for layer in range(3) for head in range(4)]
    expected = gone or [name for name in every if name != "1.3"]
    assert state.shown == "b"
    assert [edit["edit"] for edit in state.edits] == ["AblateHeads"]
    assert state.edits[0]["heads"] == expected
    assert not app.error


def test_the_difference_of_two_runs_is_b_less_a(small_model):
    edits = json.dumps([hw.AblateHeads(["0.0"]).to_dict()])
    app = opened("heads", prompt=PROMPT, edits=edits, shown="difference", **QUICK)
    state = app.session_state["headwater"]
    chosen = measure.of(state, runs.a(state))
    model = hw.load(small_model)
    before = hw.analyses.head_importance(model, PROMPT, how="ablation", loss=chosen.loss)
    with model.edit(hw.AblateHeads(["0.0"])):
        after = hw.analyses.head_importance(model, PROMPT, how="ablation", loss=chosen.loss)
    found = table(app).set_index("head")["ablation"]
    for name, value in found.items():
        layer, head = map(int, name.split("."))
        assert value == pytest.approx(float(after[layer, head] - before[layer, head]), abs=1e-5)


def test_effects_over_a_set_are_not_said_to_be_of_this_inputs_answer(monkeypatch):
    monkeypatch.setattr(models, "embedded", embedded.embedded)
    monkeypatch.setattr(effects, "EXAMPLES", 2)
    app = opened("heads", model="tasks-4l", prompt=PROMPT, **{"heads.over": "indirect_object"})
    said = [each.value.replace("\\", "") for each in app.caption if "helps" in each.value]
    assert len(said) == 2
    assert all("each example's own" in each and "Mary" not in each for each in said)


def test_effects_over_a_set_are_of_each_examples_own_answer(monkeypatch):
    monkeypatch.setattr(models, "embedded", embedded.embedded)
    monkeypatch.setattr(effects, "EXAMPLES", 3)
    state = State(model="tasks-4l", text=PROMPT)
    model, chosen = models.resident("tasks-4l"), measure.of(state, runs.a(state))
    asked = effects.of_set(model, "indirect_object", chosen)
    found = effects.effect(model, "ablation", asked)
    falls = []
    for each in hw.prompt_set("indirect_object", 3):
        ids = [
            int(model.tokenizer(word, add_special_tokens=False)["input_ids"][0])
            for word in (each.answer, each.wrong[0])
        ]
        known = [model(each.prompt)[0, -1].double().log_softmax(-1)]
        with model.edit(hw.AblateHeads(["0.0"])):
            known.append(model(each.prompt)[0, -1].double().log_softmax(-1))
        before, after = (float(row[ids[0]] - row[ids[1]]) for row in known)
        falls.append(before - after)
    assert float(found["effect"][0, 0]) == pytest.approx(np.mean(falls), abs=1e-4)
    assert min(falls) - 1e-4 <= float(found["low"][0, 0]) <= float(found["high"][0, 0]) <= max(falls) + 1e-4
    direct = effects.effect(model, "direct", asked)
    assert direct["effect"].shape == (4, 8)


def test_rank_agreement_is_spearmans():
    from scipy.stats import spearmanr

    draw = np.random.default_rng(0).integers(0, 6, (2, 4, 8)).astype(float)
    found = effects.agreement({"one": draw[0], "other": draw[1]})
    assert float(found[0, 1]) == pytest.approx(spearmanr(draw[0].ravel(), draw[1].ravel()).statistic)


def test_effects_that_are_the_same_for_every_head_have_no_order():
    """As B − A over a prompt set is, where run B is of another text: the set has its own texts."""
    columns = {
        name: xr.DataArray(values.reshape(2, 3), {"layer": [0, 1], "head": [0, 1, 2]}, ("layer", "head"))
        for name, values in {
            "ablation": np.zeros(6),
            "gradient": np.arange(6.0),
            "direct": np.ones(6),
        }.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores_of_heads.agree({name: columns[name] for name in ("ablation", "direct")}) == (
            "Rank agreement (Spearman): no order of effects that are the same for every head (without it, directly)."
        )
        told = scores_of_heads.agree({**columns, "mean": -columns["gradient"]})
    assert told.startswith("Rank agreement (Spearman): at its mean – by gradient -1.00; no order")
    assert "nan" not in told
    assert scores_of_heads.agree({"gradient": columns["gradient"]}) == ""


def test_a_role_is_named_by_the_weight_outside_the_sink():
    values = np.zeros((1, 3, 5))
    values[0, 0] = [0.02, 0.3, 0, 0.1, 0.55]  # previous, duplicate, induction, delimiter, first
    values[0, 1] = [0, 0, 0, 0, 0.95]
    values[0, 2] = [0.1, 0.1, 0.1, 0.1, 0]
    names = ["previous", "duplicate", "induction", "delimiter", "first"]
    roles = xr.DataArray(values, {"layer": [0], "head": [0, 1, 2], "role": names}, ("layer", "head", "role"))
    assert scores.role_names(roles).tolist() == [["duplicate 0.67", "sink", ""]]


def test_the_pruning_curve_is_of_the_measure(small_model):
    app = opened("heads", prompt=PROMPT, **QUICK, **{"heads.curve": "true"})
    curve = next(each.value for each in app.dataframe if "heads left" in each.value)
    model = hw.load(small_model)
    ids = model(PROMPT)[0, -1].topk(2).indices.tolist()
    assert curve["measure"].iloc[0] == pytest.approx(difference(model, *ids), abs=1e-4)
    with model.edit(hw.AblateHeads("all")):
        assert curve["measure"].iloc[-1] == pytest.approx(difference(model, *ids), abs=1e-4)
    assert (curve["random, lowest"] <= curve["random, highest"]).all()


@pytest.mark.parametrize(
    ("name", "part"), [("vit-digits", ""), ("vlm-digits", "vision"), ("clip-digits", ""), ("honest-2l", "")]
)
def test_models_without_next_tokens_have_effects_too(monkeypatch, name, part):
    monkeypatch.setattr(models, "embedded", embedded.embedded)
    app = opened(
        "heads", model=name, part=part, **{"heads.columns": json.dumps(["ablation", "gradient", "direct"])}
    )
    assert not app.error
    found = table(app)
    for column in ("ablation", "gradient"):
        assert np.isfinite(found[column]).all()
        assert found[column].abs().max() > 0
