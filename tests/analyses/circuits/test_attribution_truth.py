"""Attribution truth: a model in which first-order guesses are exact, correlations by scipy, and effects by hand.

Mutations seen to fail: sizes taken of the effects alone, effects not redrawn with their guesses, the first answer asked
of every pair, the sets of the first pair taken for all.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError

PAIRS = [
    (torch.tensor([5, 6, 7, 8]), torch.tensor([5, 9, 7, 8])),
    (torch.tensor([9, 4, 3]), torch.tensor([9, 11, 3])),
]


def test_where_attention_is_fixed_and_mlps_are_nothing_only_norms_bend(uniform: hw.HookedModel) -> None:
    """No output of a head changes anything in this model: effects are those of the embedding on the logits alone."""
    ends = [(torch.tensor([5, 6, 7]), torch.tensor([5, 6, 9])), (torch.tensor([4, 3]), torch.tensor([4, 11]))]
    found = analyses.attribution_truth(uniform, ends, draws=3, steps=2)
    moved = found.effect.where(np.abs(found.effect) > 1e-5).dropna("edge", how="all")
    assert moved.edge.values.tolist() == ["embed → logits"]
    for name in found.of_edge.values:
        best = found.predicted.sel(of_edge=name).mean("pair")
        assert best.edge.values[int(np.abs(best.values).argmax())] == "embed → logits"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_correlations_and_effects_by_hand(pairs, name: str) -> None:
    model = pairs(name).model
    found = analyses.attribution_truth(
        model, PAIRS, answer=["w8", "w3"], wrong="w20", draws=40, seed=3, steps=2
    )
    for n, (clean, corrupt) in enumerate(PAIRS):
        right = [8, 3][n]
        plain = model(clean[None])[0, -1].double()
        graph = analyses.edge_attribution(
            model, [(clean, corrupt)], how="exact", answer=f"w{right}", wrong="w20"
        )
        for edge in ("embed → logits", "0.1 → 1.2.v"):
            assert float(found.effect.sel(edge=edge)[n]) == pytest.approx(
                graph.edges[tuple(edge.split(" → "))]["score"], abs=1e-6
            )
        with model.edit(hw.AblateHeads("1.2")):
            without = model(clean[None])[0, -1].double()
        drop = (plain[right] - plain[20]) - (without[right] - without[20])
        assert float(found.effect_head.sel(layer=1, head=2)[n]) == pytest.approx(float(drop), abs=1e-4)
        gates = torch.ones(1, model.n_layers, model.n_heads)
        gates[0, 1, 2] = 1 - 1e-2
        with model.gated(gates):
            less = model(clean[None])[0, -1].double()
        slope = abs((plain[right] - plain[20]) - (less[right] - less[20])) / 1e-2
        assert float(found.predicted_head.sel(layer=1, head=2)[n]) == pytest.approx(
            float(slope), rel=0.1, abs=2e-3
        )
        mine = found.per_pair.sel(statistic="spearman", attribution="eap")[n]
        assert float(mine) == pytest.approx(
            spearmanr(found.predicted.sel(of_edge="eap")[:, n], found.effect[:, n])[0]
        )
    guess, effect = found.predicted.sel(of_edge="eap_ig_inputs").values, found.effect.values
    size = found.correlation.sel(statistic="spearman_size", attribution="eap_ig_inputs")
    assert float(size.sel(bound="mean")) == pytest.approx(
        spearmanr(np.abs(guess.mean(1)), np.abs(effect.mean(1)))[0]
    )
    picks = np.random.default_rng(3).integers(2, size=(40, 2))
    drawn = [np.corrcoef(guess[:, p].mean(1), effect[:, p].mean(1))[0, 1] for p in picks]
    pearson = found.correlation.sel(statistic="pearson", attribution="eap_ig_inputs")
    np.testing.assert_allclose(pearson[1:], np.quantile(drawn, [0.025, 0.975]), rtol=1e-6)
    heads = found.per_pair.sel(statistic="spearman", attribution="gate_slope")[0]
    assert float(heads) == pytest.approx(
        spearmanr(found.predicted_head[:, :, 0].values.ravel(), found.effect_head[:, :, 0].values.ravel())[0]
    )


def test_one_pair_one_head_and_refusals(one_head: hw.HookedModel) -> None:
    single = analyses.attribution_truth(one_head, PAIRS[:1], draws=3, steps=2)
    assert np.isnan(single.correlation.sel(bound="low")).all()
    assert single.per_pair.sizes["pair"] == 1
    with pytest.raises(AnalysisError, match="pair 0 has 3 clean and 2 corrupt tokens"):
        analyses.attribution_truth(one_head, [(torch.tensor([1, 2, 3]), torch.tensor([1, 2]))])


def test_sets_of_edges_are_summed_and_run_for_each_pair_by_itself(pairs) -> None:
    """Against the faithfulness of a circuit without them, by another way through the house."""
    model = pairs("gpt2").model
    known = [
        [
            [("embed", "logits"), ("0.1", "1.2.v")],
            [("mlp.0", "logits")],
            [("embed", "0.0.q"), ("0.0", "mlp.1")],
        ],
        [[("embed", "mlp.0"), ("mlp.0", "mlp.1")], [("0.1", "logits")]],
    ]
    found = analyses.attribution_truth(model, PAIRS, answer=["w8", "w3"], wrong="w20", known=known, steps=2)
    for pair, sets in enumerate(known):
        asked = {"answer": ["w8", "w3"][pair], "wrong": "w20"}
        graph = analyses.edge_attribution(model, [PAIRS[pair]], steps=1, **asked)
        for number, edges in enumerate(sets):
            rest = graph.copy()
            rest.remove_edges_from(edges)
            told = analyses.circuit_faithfulness(model, rest, [PAIRS[pair]], draws=1, **asked)
            drop = float(told.whole[0]) - float(told.measure.sel(kept="circuit")[0, 0])
            assert float(found.effect_set[number, pair]) == pytest.approx(drop, abs=1e-5)
            names = [f"{u} → {v}" for u, v in edges]
            for name, of in (("eap", found.predicted.sel(of_edge="eap")), ("exact", found.effect)):
                alone = float(of.sel(edge=names)[:, pair].sum())
                assert float(found.predicted_set.sel(of_set=name)[number, pair]) == pytest.approx(alone)
            assert found.edge.values[found.in_set[number, :, pair].values].tolist() == sorted(
                names, key=found.edge.values.tolist().index
            )
    assert np.isnan(found.effect_set[2, 1])
    guess = found.predicted_set.sel(of_set="exact")[:, 0]
    pearson = found.per_pair_set.sel(statistic="pearson", of_set="exact")
    assert float(pearson[0]) == pytest.approx(np.corrcoef(guess, found.effect_set[:, 0])[0, 1])
    mean = found.correlation_set.sel(statistic="pearson", of_set="exact", bound="mean")
    assert float(mean) == pytest.approx(float(pearson.mean()))


def test_sets_are_drawn_for_each_pair_and_refused_where_they_fit_none(one_head: hw.HookedModel) -> None:
    found = analyses.attribution_truth(one_head, PAIRS, sets=4, share=0.5, draws=3, steps=2, seed=2)
    held = found.in_set.transpose("pair", "set", "edge").values
    assert held.shape[:2] == (2, 4)
    assert (held.sum(-1) == round(0.5 * found.sizes["edge"])).all()
    assert (held[0] != held[1]).any()
    again = analyses.attribution_truth(one_head, PAIRS, sets=4, share=0.5, draws=3, steps=2, seed=2)
    assert again.identical(found)
    refused = {
        "give a list of 2, one per pair": [[[("embed", "logits")]]],
        "set 0 of pair 1 is empty": [[[("embed", "logits")]], [[]]],
        "has no edge embed → nowhere": [[[("embed", "nowhere")]], []],
    }
    for message, known in refused.items():
        with pytest.raises(AnalysisError, match=message):
            analyses.attribution_truth(one_head, PAIRS, known=known, draws=3, steps=2)
    with pytest.raises(AnalysisError, match="give one of the two"):
        analyses.attribution_truth(one_head, PAIRS, sets=2, known=[[], []], draws=3, steps=2)


@pytest.mark.slow
def test_attributions_foretell_the_effects_of_edges_in_the_trained_model() -> None:
    """On one short pair; docs/analyses/circuits.md has the numbers of more."""
    model = hw.load("tasks-4l")
    pair = min(hw.prompt_set("capital", 20, seed=11), key=lambda e: (len(e.prompt.split()), e.prompt))
    found = analyses.attribution_truth(model, [pair], draws=1, steps=3).per_pair[..., 0]
    size = found.sel(statistic="spearman_size")
    assert float(size.sel(attribution="eap")) > 0.9
    assert float(size.sel(attribution="eap_ig_activations")) > 0.6
    assert float(found.sel(statistic="spearman", attribution="eap")) > 0.8
    assert float(found.sel(statistic="pearson", attribution="eap_ig_activations")) > 0.4
