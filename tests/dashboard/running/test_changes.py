"""What changed between two runs, and the trials of an edit, against the formulas by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.dashboard.parts.edits import in_words
from headwater.dashboard.running import bench, changes, measure, runs
from headwater.dashboard.running.edit_kinds import kinds, positions_in, strength, with_strength
from headwater.dashboard.running.made_edits import made
from headwater.dashboard.state.state import State
from headwater.lens.errors import AnalysisError

TEXT = "When Mary and John went to the store"
TAKE = {"edit": "Redistribute", "keys": [0], "keep": 0.25, "to": "others", "heads": ["1.2"], "layers": "all"}


@pytest.fixture
def both(offered) -> tuple[runs.Run, runs.Run]:
    state = State("small", text=TEXT, edits=[TAKE])
    other = runs.b(state)
    assert other is not None
    return runs.a(state), other


def test_answers_are_the_likeliest_of_either_run_with_ranks_of_all(both):
    one, other = both
    table = changes.answers(one, other, 4)
    p, q = (torch.tensor(run.logits).softmax(-1).numpy() for run in both)
    np.testing.assert_allclose(table["p A"], p[table["id"]], rtol=1e-12)
    np.testing.assert_allclose(table["p B"], q[table["id"]], rtol=1e-12)
    assert [int((q > q[n]).sum()) + 1 for n in table["id"]] == list(table["rank B"])
    left = np.setdiff1d(np.arange(len(p)), table["id"])
    assert np.maximum(p, q)[left].max() <= np.maximum(p, q)[table["id"]].min()
    assert changes.divergence(one, other) == pytest.approx((p * np.log(p / q)).sum(), rel=1e-9)


def test_losses_of_tokens_are_those_of_the_model_under_the_edits(both):
    model = runs.resident("small")
    for run, edits in zip(both, ([], [hw.edit_from_dict(TAKE)]), strict=True):
        with model.edit(*edits):
            logits = model(TEXT)[0].double().log_softmax(-1)
        ids = model.to_tokens(TEXT).ids[0]
        wanted = [-float(logits[n, ids[n + 1]].detach()) for n in range(len(ids) - 1)]
        found = changes.token_losses(run)
        assert found is not None
        assert np.isnan(found[0])
        np.testing.assert_allclose(found[1:], wanted, rtol=1e-5)
        assert np.nanmean(found) == pytest.approx(run.loss, rel=1e-5)


def test_differences_of_texts_put_together_give_the_texts():
    one, other = "Mary gave it to John .", "Mary took it to the store ."
    pieces = changes.differing(one, other)
    assert ["".join(text for text, _ in side) for side in pieces] == [one, other]
    assert "".join(text for text, differs in pieces[0] if not differs) == "Mary it to ."


def test_random_heads_are_others_and_shared_heads_stay_shared():
    edits = [TAKE, {"edit": "ScaleHeads", "factors": {"1.2": 0.0, "0.1": 2.0}}]
    heads = [f"{layer}.{head}" for layer in range(3) for head in range(4)]
    tries = bench.elsewhere(edits, "heads", heads, 8, count=10)
    assert tries == bench.elsewhere(edits, "heads", heads, 8, count=10)
    assert tries != bench.elsewhere(edits, "heads", heads, 8, count=10, seed=1)
    for take, scale in tries:
        assert take["heads"][0] == next(iter(scale["factors"]))
        assert not {*take["heads"], *scale["factors"]} & {"1.2", "0.1"}
        assert list(scale["factors"].values()) == [0.0, 2.0]
    with pytest.raises(AnalysisError, match="not as many others"):
        bench.elsewhere([{**TAKE, "heads": heads[:7]}], "heads", heads, 8)


def test_random_tokens_take_the_place_of_the_keys_and_queries_stay():
    cut = {"edit": "Knockout", "queries": [7], "keys": [1, -8], "heads": "all", "layers": "all"}
    for (edit,) in bench.elsewhere([cut], "tokens", [], 8, count=10):
        assert edit["queries"] == [7]
        assert not {0, 1} & set(edit["keys"])
        assert len(set(edit["keys"])) == 2


def test_a_sweep_is_the_measure_at_each_strength(both):
    one, other = both
    model = runs.resident("small")
    chosen = measure.of(State("small", text=TEXT), one)
    cases = [(model.to_tokens(TEXT), [chosen])]
    found = bench.sweep(model, cases, [TAKE], 0, np.array([0.25, 1.0]))
    assert found.mean == pytest.approx([chosen.value(other), chosen.value(one)], rel=1e-4)
    assert found.plain == pytest.approx([chosen.value(one)], rel=1e-4)


def test_prompts_of_one_length_share_their_runs_and_keep_their_own_values(both, monkeypatch):
    model, chosen = runs.resident("small"), measure.of(State("small", text=TEXT), both[0])
    prompts = [TEXT, "When Mary went", "John gave a", "store When Mary", TEXT]
    examples = [SimpleNamespace(prompt=each, answer="Mary", wrong=("John",)) for each in prompts]
    monkeypatch.setattr(bench, "prompt_set", lambda *given, **more: examples)
    cases = bench.cases_of(model, "any", True, chosen, 5)
    assert sorted(len(measures) for _, measures in cases) == [2, 3]
    found = bench.sweep(model, cases, [TAKE], 0, np.array([0.25, 0.5]))
    mary, john = (model.tokenizer.convert_tokens_to_ids(each) for each in ("Mary", "John"))
    for row, keep in zip((*found.values, found.plain), (0.25, 0.5, 1.0), strict=True):
        wanted = []
        for each in prompts:
            with model.edit(hw.edit_from_dict(TAKE | {"keep": keep})):
                known = model(each)[0, -1].double().log_softmax(-1)
            wanted.append(float(known[mary] - known[john]))
        assert sorted(row) == pytest.approx(sorted(wanted), abs=1e-4)


def test_the_interval_of_a_sweep_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(size=(1, 400))
    low, high = bench.Sweep(np.zeros(1), values, values[0]).interval
    wide = 1.96 * values.std() / 20
    assert low[0] == pytest.approx(values.mean() - wide, abs=0.02)
    assert high[0] == pytest.approx(values.mean() + wide, abs=0.02)


def test_strengths_are_read_and_set():
    read = strength(TAKE)
    assert read is not None
    assert read.value == 0.25
    assert with_strength(TAKE, 0.5)["keep"] == 0.5
    scale = {"edit": "ScaleHeads", "factors": {"0.1": 4.0, "0.2": 4.0}}
    read = strength(scale)
    assert read is not None
    assert (read.value, read.high) == (4.0, 4.0)
    assert with_strength(scale, 0.0)["factors"] == {"0.1": 0.0, "0.2": 0.0}
    assert strength({"edit": "ScaleHeads", "factors": {"0.1": 4.0, "0.2": 1.0}}) is None
    assert strength({"edit": "Normaliser", "name": "sigmoid"}) is None


@pytest.mark.usefixtures("offered")
def test_heads_mixed_by_half_move_each_map_half_way_to_the_mean():
    model = runs.resident("small")
    edit = hw.edit_from_dict(made(kinds()["HeadMix"], {"amount": 0.5, "layers": [0]}, model, TEXT))
    plain = model.record(TEXT).pattern(0)[0]
    with model.edit(edit):
        found = model.record(TEXT).pattern(0)[0]
    torch.testing.assert_close(found, (plain + plain.mean(0)) / 2)


def test_edits_in_words():
    tokens = ["<bos>", "Mary", "gave"]
    said = lambda **edit: in_words(edit, tokens)  # noqa: E731
    assert said(**TAKE) == "75% of what goes to ‹<bos>› → others, head 1.2"
    assert (
        said(edit="Knockout", queries=[2], keys=[1], heads="all")
        == "‹gave› can not look at ‹Mary›, all heads"
    )
    assert said(edit="BiasKeys", keys=[0], bias=-2.0, heads="0.1") == "scores on ‹<bos>› -2, head 0.1"
    sinks = said(edit="ScaleWeights", keys="sinks:share:0.3", factor=0.0, layers=[1], heads="all")
    assert sinks == "weights on sinks (a large share, 0.3) × 0, not renormalised, layer 1"
    assert (
        said(edit="MoveAttention", source=[0], to=[1], amount=1.0)
        == "100% of what goes to ‹<bos>› → ‹Mary›, all heads"
    )
    assert positions_in({"keys": [2, "token:Mary"], "to": "others", "queries": -1}) == [-1, 2]
