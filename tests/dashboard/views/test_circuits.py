"""The page Circuits: edges are the library's, of the page's measure; what an edge is worth is told by a run."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from opened_app import figure, opened, values

import headwater as hw
from headwater.dashboard.running import circuits, measure, pairs, runs
from headwater.dashboard.state.state import State

PROMPT = "When Mary and John went to the store , John gave a drink to"
OTHER = "When Mary and John went to the store , Mary gave a drink to"


def settled(app):
    """The page once its jobs have ended."""
    for _ in range(200):
        if not any(button.label == "Cancel" for button in app.button):
            return app
        time.sleep(0.05)
        app.run()
    raise AssertionError("the jobs of the page do not end")


def edges_drawn(app, name: str) -> list:
    """The texts on hover of the edges of the figure."""
    return next(trace for trace in figure(app, name)["data"] if trace.get("name") == "edges")["text"]


@pytest.mark.usefixtures("offered")
class TestOfTheSmallModel:
    @pytest.mark.parametrize("size", ["abc", "99999", "[]"])
    def test_a_number_of_edges_that_does_not_fit_is_told_and_the_first_one_used(self, size):
        given = {"prompt": PROMPT, "pair.text": OTHER, "circuits.size": size}
        app = settled(opened("circuits", **given))
        assert any("circuits" in each.value for each in app.warning)
        assert len(edges_drawn(app, "circuit-edges")) == 60
        assert app.slider(key="bound-circuits-size").value == 60
        plain = settled(opened("circuits", **given | {"circuits.size": "60"}))
        assert [each.value for each in app.metric] == [each.value for each in plain.metric]

    def test_edges_are_those_of_the_library_for_the_measure(self, small_model):
        app = settled(opened("circuits", prompt=PROMPT, **{"pair.text": OTHER}))
        assert not app.error
        state = State(model="small", text=PROMPT)
        run = runs.a(state)
        chosen = measure.of(state, run)

        def value(logits):
            known = logits[:, 14].double().log_softmax(-1)
            return known[:, chosen.answer] - known[:, chosen.wrong]

        graph = hw.analyses.edge_attribution(
            hw.load(small_model), [(PROMPT, OTHER)], measure=value, steps=5, draws=1
        )
        wanted = sorted((abs(s) for *_, s in graph.edges(data="score") if s is not None), reverse=True)[:60]
        drawn = sorted(
            abs(float(text.split("<br>")[1].split()[0])) for text in edges_drawn(app, "circuit-edges")
        )
        assert np.allclose(drawn[::-1], wanted, rtol=1e-3)

    def test_the_curve_of_the_ranking_is_that_of_the_library_and_is_asked_for(self, small_model):
        asked = {"prompt": PROMPT, "pair.text": OTHER}
        assert not [each for each in settled(opened("circuits", **asked)).metric if "CMD" in each.label]
        app = settled(opened("circuits", **asked, **{"circuits.curve": "true"}))
        assert not app.error
        _, _, value, model = asked_of_the_library(small_model)
        graph = hw.analyses.edge_attribution(model, [(PROMPT, OTHER)], measure=value, steps=5, draws=1)
        found = hw.analyses.circuit_curve(model, graph, [(PROMPT, OTHER)], measure=value, draws=1)
        told = {each.label[:3]: each.value for each in app.metric}
        for name in ("cpr", "cmd"):
            assert told[name.upper()] == f"{float(found[name].sel(bound='mean')):.3f}"
        drawn = figure(app, "circuit-curve")["data"]
        for trace, ranking in zip(drawn, ("signed", "absolute"), strict=True):
            np.testing.assert_allclose(trace["x"], 100 * found.share.values)
            wanted = found.f.sel(ranking=ranking, bound="mean").values
            np.testing.assert_allclose(values(trace, "y"), wanted, atol=1e-5)

    def test_without_an_edge_is_a_run_with_that_edge_alone_changed(self, small_model):
        state = State(model="small", text=PROMPT)
        run = runs.a(state)
        chosen = measure.of(state, run)
        exact = hw.analyses.edge_attribution(
            hw.load(small_model),
            [(PROMPT, OTHER)],
            measure=circuits.value_of_pairs(chosen, run),
            how="exact",
            draws=1,
        )
        edge = max(
            (each for each in exact.edges(data="score") if each[2] is not None), key=lambda each: abs(each[2])
        )
        left = circuits.without_edge(state, run, chosen, OTHER, *edge[:2])
        assert chosen.value(run) - left == pytest.approx(edge[2], abs=1e-4)
        assert circuits.without_edge(state, run, chosen, OTHER, "1.0", "0.1.q") is None

    def test_without_a_head_is_an_ablation(self, small_model):
        state = State(model="small", text=PROMPT)
        run = runs.a(state)
        chosen = measure.of(state, run)
        model = hw.load(small_model)
        with model.edit(hw.AblateHeads("1.2")):
            known = model(PROMPT)[0, -1].double().log_softmax(-1)
        wanted = float(known[chosen.answer] - known[chosen.wrong])
        assert circuits.without_head(state, run, chosen, "1.2") == pytest.approx(wanted, abs=1e-5)

    def test_traces_and_routes_open_and_an_edge_is_verified(self):
        for method in ("trace", "routes"):
            more = {"circuits.method": method, "circuits.edge": "0"}
            app = settled(opened("circuits", prompt=PROMPT, **more))
            assert not app.error
            if method == "routes":
                app.button(key="verify-edge").click().run()
                settled(app)
                assert not app.error
                table = next(each.value for each in app.dataframe if "run" in each.value.columns)
                assert table["run"][0] == "as it is"
                assert len(table) >= 2

    def test_a_circuit_is_found_again_with_other_corrupt_prompts_where_it_is_asked_for(self, small_model):
        typed = "When Mary and John went to the store , Mary gave a drink for"
        given = {"prompt": PROMPT, "pair.text": typed, "circuits.size": "20"}
        plain = settled(opened("circuits", **given))
        said = [each.value.replace("\\", "") for each in plain.caption]
        assert "Stability: unknown: one pair, so there is nothing to redraw." in said
        assert not [each for each in plain.metric if "other corrupt" in each.label]
        app = settled(opened("circuits", **given, **{"circuits.again": "true"}))
        assert not app.error
        state, chosen, value, model = asked_of_the_library(small_model)
        best = []
        (other,) = (text for text, _ in pairs.found(state, chosen))
        for corrupt in (typed, other):
            graph = hw.analyses.edge_attribution(model, [(PROMPT, corrupt)], measure=value, steps=5, draws=1)
            known = [edge for edge in graph.edges(data="score") if edge[2] is not None]
            best.append({edge[:2] for edge in sorted(known, key=lambda edge: -abs(edge[2]))[:20]})
        share = len(best[0] & best[1]) / len(best[0] | best[1])
        told = {each.label: each.value for each in app.metric}
        assert 0 < share < 1
        assert told["Edges shared with those of 1 other corrupt prompt"] == f"{share:.1%}"
        assert float(told["By chance"].rstrip("%")) / 100 < share

    def test_effects_of_edges_under_edits_are_said_not_to_be_there(self):
        edits = json.dumps([{"edit": "AblateHeads", "heads": ["0.1"]}])
        app = settled(opened("circuits", prompt=PROMPT, edits=edits, shown="b", **{"pair.text": OTHER}))
        assert any("choose run A at the top" in each.value for each in app.info)
        assert not any("model.edit" in each.value for each in app.caption)

    def test_a_loss_is_told_to_explain_no_answer(self):
        app = settled(opened("circuits", prompt=PROMPT, kind="loss"))
        assert not app.error
        assert any("explain an answer" in each.value for each in app.info)


class TestTables:
    def test_groups_add_the_weights_of_their_edges(self):
        import pandas as pd

        rows = [
            ("0.0", "1.0", "q", 1.0, "", ""),
            ("0.1", "1.0", "k", 2.0, "", ""),
            ("0.0", "0.1", "q", 5.0, "", ""),
        ]
        edges = pd.DataFrame(rows, columns=circuits.COLUMNS)
        found = circuits.grouped(edges, {"early": ["0.0", "0.1"]})
        assert found[["sender", "reader", "weight"]].values.tolist() == [["early", "1.0", 3.0]]

    @pytest.mark.usefixtures("offered")
    def test_the_corrupt_prompt_has_the_answer_for_the_name_said_last(self):
        state = State(model="small", text=PROMPT)
        run = runs.a(state)
        mary = next(n for n in range(20) if run.label(n) == "Mary")
        state.answer = mary
        assert pairs.corrupt(state, measure.of(state, run)).example == OTHER


def asked_of_the_library(folder):
    """The page's state, its measure, that measure of pairs, and the model, to ask the library for the same."""
    state = State(model="small", text=PROMPT)
    run = runs.a(state)
    chosen = measure.of(state, run)
    return state, chosen, circuits.value_of_pairs(chosen, run), hw.load(folder)
