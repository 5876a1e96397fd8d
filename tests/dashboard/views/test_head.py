"""The page Head: its map is exact, its clicks are the state's, and it reads every kind of model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from canvas_events import canvases, header_of, send
from opened_app import opened

import headwater as hw
from headwater.dashboard.running import compare, head as of_head, measure, models, runs
from headwater.dashboard.state.state import State
from headwater.lens.models import embedded

pytestmark = pytest.mark.usefixtures("offered")
PROMPT = "When Mary and John went to the store , John gave a drink to"
CUT = {"edit": "Knockout", "queries": [14], "keys": [3], "heads": ["1.2"], "layers": "all"}


def test_a_click_on_a_pair_chooses_it_and_can_be_cut(small_model):
    app = opened("head", layer="1", head="2", prompt=PROMPT)
    send(app, "map", {"cell": [14, 3]})
    state = app.session_state["headwater"]
    assert (state.query, state.key) == (14, 3)
    assert (app.query_params["query"], app.query_params["key"]) == ("14", "3")
    app.button(key="cut-pair").click().run()
    assert app.session_state["headwater"].edits == [CUT]
    other = runs.b(app.session_state["headwater"])
    model = hw.load(small_model)
    with model.edit(hw.Knockout(queries=[14], keys=[3], heads=["1.2"])):
        expected = model.record(PROMPT).pattern(1, 2)[0].numpy()
    np.testing.assert_allclose(runs.pattern(other, 1, 2), expected, atol=1e-6)
    assert expected[14, 3] == 0


def test_arrows_walk_to_the_heads_beside_and_stop_at_the_last():
    app = opened("head", layer="1", head="2", prompt=PROMPT)
    send(app, "map", {"walk": [1, 0]})
    assert app.header[0].value == "Head 2.2"
    send(app, "map", {"walk": [1, 1]})
    assert app.header[0].value == "Head 2.3"


def test_a_window_is_exact_and_stays_in_the_address(small_model):
    long = " ".join(["When Mary and John went to the store ,"] * 66)
    state = State(model="small", text=long)
    app = opened("head", prompt=long)
    assert header_of(app, "map")["block"] == 2
    send(app, "map", {"window": [300, 310, 0, 400]})
    assert app.session_state["headwater"].settings["head.window"] == [300, 310, 0, 400]
    header = header_of(app, "map")
    assert (header["block"], header["rows"], header["columns"], header["first"]) == (1, 10, 400, [300, 0])
    assert len(canvases(app)["map"].bytes) < 500_000
    run = runs.a(state)
    weights = hw.load(small_model).record(long).pattern(0, 0)[0].numpy()
    np.testing.assert_allclose(
        runs.pattern(run, 0, 0, slice(300, 310), slice(0, 400)), weights[300:310, :400], atol=1e-6
    )
    send(app, "map", {"window": None})
    assert header_of(app, "map")["block"] == 2


def test_a_difference_without_any_says_so():
    edit = {
        "edit": "AblateHeads",
        "heads": ["2.0"],
        "ablation": "zero",
        "examples": None,
        "seed": 0,
        "layers": "all",
    }
    app = opened("head", layer="0", head="0", prompt=PROMPT, edits=json.dumps([edit]), shown="difference")
    assert "no weight changed by more than" in header_of(app, "change")["note"]


def test_why_and_what_add_up(monkeypatch):
    monkeypatch.setattr(models, "embedded", embedded.embedded)
    state = State(model="tasks-4l", text=PROMPT, layer=2, head=0)
    run = runs.a(state)
    why = of_head.why(state, run, 14, 2)
    q, k = (part[0, 0].double() for part in _queries_and_keys(state))
    assert why["score"].sum() == pytest.approx(float(q[14] @ k[2]) / np.sqrt(q.shape[-1]), rel=1e-4)
    chosen = measure.of(state, run)
    writes = of_head.writes(state, run, chosen)
    parts = hw.analyses.direct_logit_attribution(
        models.resident("tasks-4l"), PROMPT, answer=chosen.settings["answer"], wrong=chosen.settings["wrong"]
    )
    total = (
        float(parts.sel(component="2.0").squeeze()) if "component" in parts.dims else writes["logit"].sum()
    )
    assert writes["logit"].sum() == pytest.approx(total, abs=1e-4)


def _queries_and_keys(state: State):
    """Queries and keys of the head as the model makes them, by a hook."""
    model = models.resident(state.model)
    record = model.record(state.text, keep=("qk",))
    kept = record.maps[state.layer]
    group = model.n_heads // model.n_kv_heads
    return kept.q[:, state.head : state.head + 1], kept.k[:, state.head // group : state.head // group + 1]


@pytest.mark.parametrize("name", ["vit-digits", "vlm-digits", "clip-digits", "video-digits", "honest-2l"])
def test_every_kind_of_model_and_part_opens(name, monkeypatch):
    monkeypatch.setattr(models, "embedded", embedded.embedded)
    for part in ("", *list(models.resident(name).parts)[1:]):
        app = opened("head", model=name, part=part)
        assert not app.exception
        assert not app.error
        assert "map" in canvases(app)


def test_hostile_tokens_reach_the_map_as_text():
    app = opened("head", prompt="<s> </s> &lt; $x$ **b** When When")
    assert header_of(app, "map")["keys"] == ["<bos>", "<s>", "</s>", "&lt;", "$x$", "**b**", "When", "When"]


def test_the_difference_to_another_text_is_that_of_the_aligned_tokens(small_model):
    """In run B one token is another and two are new: these two are left out, the others stand on A's places."""
    other = "When John and John went to the <unk> <unk> store , John gave a drink to"
    app = opened("head", layer="1", head="2", prompt=PROMPT, b_prompt=other, shown="difference")
    assert any("one in the place of another" in each.value for each in app.caption)
    one, two = (runs.pattern(run(app.session_state["headwater"]), 1, 2) for run in (runs.a, runs.b))
    places = [*range(8), *range(10, 17)]  # of the tokens of A in B
    found = compare.change_of_map(
        *(run(app.session_state["headwater"]) for run in (runs.a, runs.b)),
        1,
        2,
        (slice(0, 15), slice(0, 15)),
        100,
    )
    np.testing.assert_allclose(found, two[np.ix_(places, places)] - one, atol=1e-7)


def test_an_address_that_asks_for_a_second_run_without_one_shows_the_first():
    app = opened("heads", prompt=PROMPT, edits='[{"edit": "Nothing"}]', shown="difference")
    assert not any("other heads" in each.value for each in app.info)
    assert app.session_state["headwater"].shown == "a"
