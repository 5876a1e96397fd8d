"""The page Compare: aligned tokens, both runs' numbers, what one of them lacks."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from opened_app import figure, opened, values

import headwater as hw
from headwater.dashboard.running import compare, runs
from headwater.dashboard.state.state import State

PROMPT = "When Mary and John went to the store , John gave a drink to"
LONGER = "When Mary and John went to the store a , Mary gave a drink to"


class TestAlignment:
    def test_an_insertion_has_no_partner_and_the_rest_moves_on(self):
        found = compare.aligned(["a", "b", "c"], ["a", "x", "b", "c"])
        assert found.pairs == [(0, 0), (None, 1), (1, 2), (2, 3)]
        assert (found.only(0), found.only(1)) == ([], [1])
        assert (found.to_b(2), found.to_a(3), found.to_a(1)) == (3, 2, None)

    def test_as_many_other_tokens_stand_beside_each_other(self):
        assert compare.aligned(["a", "b", "c"], ["a", "x", "c"]).pairs == [(0, 0), (1, 1), (2, 2)]

    def test_every_token_has_one_place_in_order_and_common_ends_are_not_matched(self, monkeypatch):
        drawn, given = random.Random(0), []
        whole = compare.SequenceMatcher
        monkeypatch.setattr(
            compare,
            "SequenceMatcher",
            lambda junk, *both, **more: given.append(both) or whole(junk, *both, **more),
        )
        for _ in range(200):
            one, other = (drawn.choices("ab", k=drawn.randrange(6)) for _ in range(2))
            pairs = compare.aligned(one, other).pairs
            for side, tokens in enumerate((one, other)):
                assert [pair[side] for pair in pairs if pair[side] is not None] == list(range(len(tokens)))
            for left, right in given[-1:]:
                assert not (left and right and (left[0] == right[0] or left[-1] == right[-1]))
        assert compare.aligned(one, one).pairs == [(n, n) for n in range(len(one))]
        assert given[-1] == ([], [])


@pytest.mark.usefixtures("offered")
class TestOfTheSmallModel:
    def test_one_run_alone_says_how_to_make_another(self):
        app = opened("compare", prompt=PROMPT)
        assert any("one run" in each.value for each in app.info)

    def test_answers_of_both_runs_and_the_measure(self, small_model):
        edit = {"edit": "AblateHeads", "heads": ["0.1"]}
        app = opened("compare", prompt=PROMPT, edits=json.dumps([edit]), **{"compare.view": "answers"})
        assert not app.error
        model = hw.load(small_model)
        plain = model(PROMPT)[0, -1].double().softmax(-1)
        with model.edit(hw.AblateHeads("0.1")):
            edited = model(PROMPT)[0, -1].double().softmax(-1)
        for table, wanted in zip(app.dataframe[-2:], (plain, edited), strict=True):
            assert np.allclose(table.value["p"], wanted.topk(10).values, atol=1e-6)

    def test_sinks_of_two_texts_swapped_and_the_insertion_is_marked(self):
        more = {"compare.view": "sinks", "compare.swapped": "true"}
        app = opened("compare", prompt=PROMPT, b_prompt=LONGER, **more)
        assert any("Only in B" in each.value for each in app.caption)
        state = State(model="small", text=PROMPT, b_text=LONGER)
        other = runs.b(state)
        assert other is not None
        bars = values(figure(app, "compare-sinks-B")["data"][0], "y")
        maps = [runs.pattern(other, layer, head) for layer in other.layers for head in range(other.n_heads)]
        seen_by = np.arange(len(other.keys), 0, -1)
        assert np.allclose(bars, np.mean([weights.sum(0) / seen_by for weights in maps], axis=0), atol=1e-5)

    def test_each_view_opens(self):
        for view in ("map", "heads"):
            app = opened(
                "compare", prompt=PROMPT, b_prompt=LONGER, query="14", key="2", **{"compare.view": view}
            )
            assert not app.error
            assert not app.exception
            if view == "map":
                assert sum("→" in each.value for each in app.caption) == 2
