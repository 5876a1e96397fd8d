"""Estimated patches, edges and token shares against the rules written out in float64 (support/backward_oracle.py).

Mutations seen to fail: half rule left out, the scale of norms not held, temperature 1, sides exchanged in the change.
"""

from __future__ import annotations

from collections.abc import Callable

import backward_oracle
import numpy as np
import pytest
import torch
from patch_pairs import ANSWER, CLEAN, CORRUPT, WRONG, difference

import headwater as hw
from headwater import analyses
from headwater.analyses._measures.pair_scores import Asked
from headwater.analyses._prompts.pairs import pairs_of
from headwater.analyses._streams.component_graph import Wiring
from headwater.analyses.circuits._counterfactuals import cases_of, nodes_of_layers, slopes
from headwater.lens.attention import backward_rules
from headwater.lens.errors import AnalysisError

RULES = ("gradient", "relp", "relp_released", "gim", "attnlrp")
ASKED = Asked(difference, None, None, -1)
WHATS = ("residual", "attention", "mlp", "head", "head_position")


def expected(twin, what: str, rule: str, how: str) -> np.ndarray:
    """Σ_d slope · (other - own) over the way between the two measures, [pair, layer, …]."""
    base, other = (CORRUPT, CLEAN) if how == "denoise" else (CLEAN, CORRUPT)
    ran, slopes, _ = backward_oracle.flowing(twin, base, rule, difference)
    theirs = backward_oracle.run(twin, other, rule)
    begin, end = difference(ran.logits).detach(), difference(theirs.logits).detach()
    kind = "head" if what.startswith("head") else what
    rows = []
    for layer in range(3):
        site = (kind, layer)
        cell = (slopes[site] * (theirs.values[site] - ran.values[site])).sum(-1)  # [pair, position(, head)]
        rows.append(cell.sum(1) if what == "head" else cell.mT if what == "head_position" else cell)
    return (torch.stack(rows, 1) / (end - begin).view(-1, 1, *[1] * (rows[0].dim() - 1))).numpy()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_all_cells_come_from_one_backward_pass(pairs: Callable, name: str, rule: str) -> None:
    pair = pairs(name)
    for what in WHATS:
        for how in ("denoise", "noise") if what == "mlp" else ("denoise",):
            found = analyses.patch(
                pair.model, CLEAN, CORRUPT, what=what, how=how, answer=ANSWER, wrong=WRONG, estimate=rule
            )
            told = expected(pair.twin, what, rule, how)
            np.testing.assert_allclose(found.values, told, rtol=1e-3, atol=2e-4 * np.abs(told).max())


def test_rules_differ_from_each_other(pairs: Callable) -> None:
    ask = {"what": "residual", "answer": ANSWER, "wrong": WRONG}
    found = [analyses.patch(pairs("llama").model, CLEAN, CORRUPT, estimate=r, **ask).values for r in RULES]
    gaps = [np.abs(a - b).max() for n, a in enumerate(found) for b in found[:n]]
    assert min(gaps) > 0.01


@pytest.mark.parametrize("rule", ["relp", "gim"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_edges_follow_the_rule(pairs: Callable, name: str, rule: str) -> None:
    """The edges out of a node sum to what flows back to it; the oracle knows that of MLPs and of all heads together."""
    pair = pairs(name)
    ask = {"measure": difference, "steps": 1, "rule": rule, "draws": 1}
    graph = analyses.edge_attribution(pair.model, CLEAN, CORRUPT, **ask)
    ran, slopes, _ = backward_oracle.flowing(pair.twin, CLEAN, rule, difference)
    other = backward_oracle.run(pair.twin, CORRUPT, rule)
    for layer in range(2):
        for kind, nodes in (("mlp", [f"mlp.{layer}"]), ("attention", [f"{layer}.{h}" for h in range(4)])):
            site = (kind, layer)
            told = float((slopes[site] * (ran.values[site] - other.values[site])).sum((1, 2)).mean())
            out = [s for u, _, s in graph.out_edges(nodes, data="score")]
            assert sum(out) == pytest.approx(told, rel=1e-3, abs=1e-5)
    into_scores = [s for _, v, s in graph.edges(data="score") if s is not None and v[-1] in "qk"]
    assert (max(map(abs, into_scores)) == 0) == (rule == "relp")


def test_heads_that_others_stand_in_for_hand_nothing_back(pairs: Callable) -> None:
    """Gemma 2 has a norm behind its heads, whose scale is constant in the graph's own sum of them too."""
    model = pairs("gemma2").model
    wiring = Wiring(model)
    (case,) = cases_of(wiring, pairs_of(model, list(zip(CLEAN, CORRUPT, strict=True))), ASKED, "resample")
    site = nodes_of_layers(wiring)[1]
    with backward_rules.following("relp"):
        scores = slopes(wiring, case, site.start, case.other[site])
    values = [n for n, name in enumerate(wiring.receivers) if name.startswith("0.") and name.endswith(".v")]
    later = [n for n, name in enumerate(wiring.receivers) if name.startswith("1.") and name.endswith(".v")]
    assert scores[..., values].abs().max() < 1e-5 * scores[..., later].abs().max()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_relp_conserves_a_logit_of_a_model_without_biases(pairs: Callable, name: str) -> None:
    model = pairs(name).model
    ask = {"answer": ANSWER, "kind": "logit"}
    shares = analyses.input_x_gradient(model, CLEAN, rule="relp", **ask)
    logits = model(CLEAN)[torch.arange(2), -1, torch.tensor([11, 12])].double().numpy()
    np.testing.assert_allclose(shares.sum("key").values, logits, rtol=1e-5, atol=1e-6 * np.abs(shares).max())
    plain = analyses.input_x_gradient(model, CLEAN, **ask)
    assert np.abs(plain.sum("key").values - logits).min() > 1e-2 * np.abs(logits).min()


@pytest.mark.parametrize("rule", RULES)
def test_token_shares_are_the_embeddings_times_what_flows_back(pairs: Callable, rule: str) -> None:
    pair = pairs("llama")
    found = analyses.input_x_gradient(pair.model, CLEAN, answer=ANSWER, wrong=WRONG, kind="logit", rule=rule)
    ran, _, flow = backward_oracle.flowing(pair.twin, CLEAN, rule, difference)
    told = (ran.embedded * flow).sum(-1).detach().numpy()
    np.testing.assert_allclose(found.values, told, rtol=1e-3, atol=1e-4 * np.abs(told).max())
    if rule in ("relp", "gim", "attnlrp"):
        ask = {"answer": ANSWER, "wrong": WRONG, "kind": "logit", "draws": 2}
        two = analyses.agreement(pair.model, CLEAN, [rule, "blank_out"], by="pearson", absolute=False, **ask)
        blank = analyses.blank_out(pair.model, CLEAN, answer=ANSWER, wrong=WRONG, kind="logit").values
        by_hand = [np.corrcoef(a, b)[0, 1] for a, b in zip(told, blank, strict=True)]
        np.testing.assert_allclose(two.agreement.values[:, 0, 1], by_hand, atol=1e-3)


def test_what_has_no_estimate(pairs: Callable) -> None:
    model = pairs("llama").model
    with pytest.raises(AnalysisError, match="estimate= is for what=head"):
        analyses.patch(model, CLEAN, CORRUPT, what="pattern", estimate="relp", answer=ANSWER, wrong=WRONG)
    with pytest.raises(AnalysisError, match="takes no gradient"):
        analyses.edge_attribution(model, CLEAN, CORRUPT, how="exact", rule="gim")
    with pytest.raises(AnalysisError, match="relp"):
        analyses.patch(model, CLEAN, CORRUPT, what="mlp", estimate="relpp", answer=ANSWER, wrong=WRONG)


def test_estimates_of_a_planted_model_are_near_its_runs() -> None:
    model = hw.load("tasks-4l")
    clean = "When Mary and John went to the store , John gave a drink to"
    corrupt = "When Mary and John went to the store , Mary gave a drink to"
    ask = {"answer": "Mary", "wrong": "John", "what": "mlp"}
    runs = analyses.patch(model, clean, corrupt, **ask).values.ravel()
    near = analyses.patch(model, clean, corrupt, estimate="relp", **ask).values.ravel()
    seen = ~np.isnan(runs)
    assert np.corrcoef(runs[seen], near[seen])[0, 1] > 0.9
