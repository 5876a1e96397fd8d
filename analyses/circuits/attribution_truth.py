"""Whether attributions predict the real effects: every edge and head is changed by itself, and both are correlated.

The attribution of an edge estimates, to first order, how far the measure falls when the edge carries the corrupt prompt
(EAP of Syed et al. 2023, EAP-IG of Hanna et al. 2024). Here the same change is made. For heads the slope at the gate
(Michel et al. 2019) is compared with the removal of the head. Sets of edges are changed together, and the sum of their
attributions is compared with the effect of the set, as Park et al. 2023 do for examples of a training set. The
comparison is ours.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from scipy.stats import rankdata

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds, Draws, Seed
from headwater.analyses._measures.bootstrap import LEVEL, bounds, interval, redraws
from headwater.analyses._measures.measure import AnswerSetting, PositionSetting, WrongSetting
from headwater.analyses._measures.pair_scores import Asked, PairMeasure
from headwater.analyses._prompts.examples import Examples, outputs_of
from headwater.analyses._prompts.pairs import PairExamples, Pairs, pairs_of, side_by_side
from headwater.analyses._streams.component_graph import Wiring
from headwater.analyses.circuits._counterfactuals import Case, cases_of
from headwater.analyses.circuits._edge_sets import Edges, drawn_sets, effects_of_sets, given_sets
from headwater.analyses.circuits._graphs import edges_of, graph_of
from headwater.analyses.circuits.edge_attribution import How, edge_attribution
from headwater.analyses.heads.head_importance import head_importance
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress

EDGES: dict[str, How] = {
    "eap": "inputs", "eap_ig_inputs": "inputs", "eap_ig_activations": "activations", "clean_corrupt": "clean_corrupt",
}  # fmt: skip
HEADS = "gate_slope"
STATISTICS = ("spearman", "spearman_size", "pearson")


@analysis
def attribution_truth(
    model: HookedModel,
    pairs: Examples | PairExamples,
    corrupt: Examples | None = None,
    measure: PairMeasure = "logit_difference",
    steps: Annotated[int, "points between corrupt and clean of EAP-IG", Bounds(2, 1000)] = 5,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    sets: Annotated[int, "sets of edges drawn for each pair and changed together", Bounds(0)] = 0,
    share: Annotated[float, "part of the edges in a drawn set", Bounds(0, 1, above=True)] = 0.1,
    known: Any = None,
    draws: Draws = 1000,
    seed: Seed = 0,
) -> xr.Dataset:
    """`correlation` [statistic, attribution, bound] between predicted and real effects, both means over pairs.

    Attributions of edges: "eap", "eap_ig_inputs", "eap_ig_activations" and "clean_corrupt", compared with the exact
    drop `m(clean) - m(clean with the edge carrying the corrupt prompt)`, as in `edge_attribution`. Of heads:
    "gate_slope", |∂m/∂ξ| at the gates on the clean prompt, compared with the drop when the head's output is zero
    (`head_importance`). Statistics: Spearman's ρ of the values, Spearman's ρ of their absolute values, and Pearson's r.
    Bounds: "mean", and "low" and "high", which hold 95 % of the values of resampled pairs (NaN for one pair).
    `per_pair` [statistic, attribution, pair] is the correlation within each pair, NaN where an effect is constant.
    `predicted` [of_edge, edge, pair], `effect` [edge, pair], `predicted_head` and `effect_head` [layer, head, pair].

    With `sets`, each pair has that many sets of its own, each a random `share` of the edges; or `known` gives the sets
    of each pair: a list per pair of circuits or of lists of edges (u, v), as many and as large as the pair has. The
    edges of a set are changed together. `predicted_set` [of_set, set, pair] is the sum of their attributions, and of
    their exact effects one by one ("exact"); `effect_set` [set, pair] is the drop. `per_pair_set` [statistic, of_set,
    pair] is their correlation over the sets of a pair, `correlation_set` [statistic, of_set, bound] its mean over pairs
    (NaN where a pair has too few sets). `in_set` [set, edge, pair] tells which edges a set holds.

    Pairs and measure are as in `edge_attribution`; a measure is called with one pair at a time.

    Question: Do attributions foretell what changing each edge, or removing each head, does to the measure?
    Unit: correlation, -1 to 1; predicted and effect: that of the measure (positive: the edge or head helps).
    Source: ours; of Syed et al. 2023, arXiv:2310.10348; Hanna et al. 2024, arXiv:2403.17806; Michel et al. 2019; sets
    as those of training examples in the linear datamodeling score of Park et al. 2023, arXiv:2303.14186.
    Cost: a forward pass per edge, set, head and pair (1,519 edges of 30 tokens: 4 s on two cores).
    Not for: choosing a circuit (circuit_faithfulness): a random set may hold none of the edges that matter; edges that
    back each other up look needless one by one in truth too, and sets tell how far sums are from the effect.

    >>> import headwater as hw
    >>> import torch, transformers
    >>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)
    >>> model = hw.load(transformers.GPT2LMHeadModel(config))
    >>> pair = torch.tensor([5, 6, 7]), torch.tensor([5, 9, 7])
    >>> hw.analyses.attribution_truth(model, [pair], draws=1).attribution.values.tolist()
    ['eap', 'eap_ig_inputs', 'eap_ig_activations', 'clean_corrupt', 'gate_slope']
    """
    pairs = side_by_side(model, pairs, corrupt)
    asked = Asked(measure, answer, wrong, position)
    wiring = Wiring(model)
    edges = edges_of(graph_of(wiring, None, {}))
    if sets and known is not None:
        raise AnalysisError("sets draws sets of edges and known gives them; give one of the two")
    members = None
    if known is not None:
        members = given_sets(wiring, edges, known, len(pairs))
    elif sets:
        members = drawn_sets(edges, len(pairs), sets, share, seed)
    of_heads = np.empty((2, len(model.layers), model.n_heads, len(pairs)))  # slope and effect
    for pair in progress(pairs_of(model, pairs, 1), desc="heads", unit="pair"):
        of_heads[..., pair.places] = _heads(model, pair, asked)[..., None]
    ways: dict[str, How] = {**EDGES, "exact": "exact"}
    graphs = [
        edge_attribution(
            model, pairs, measure=measure, steps=1 if name == "eap" else steps, how=how, answer=answer, wrong=wrong,
            position=position, draws=1, per_pair=True, batch_size=1,
        )
        for name, how in ways.items()
    ]  # fmt: skip
    # [method and exact, edge, pair]
    scores = np.array([[json.loads(graph.edges[edge]["scores"]) for edge in edges] for graph in graphs])
    guesses = [(scores[n], scores[-1]) for n in range(len(EDGES))]
    guesses.append((of_heads[0].reshape(-1, len(pairs)), of_heads[1].reshape(-1, len(pairs))))
    bounds, per_pair = zip(*(_correlations(*both, draws, seed) for both in guesses), strict=True)
    result = xr.Dataset(
        {
            "correlation": (("statistic", "attribution", "bound"), np.stack(bounds, 1)),
            "per_pair": (("statistic", "attribution", "pair"), np.stack(per_pair, 1)),
            "predicted": (("of_edge", "edge", "pair"), scores[:-1]),
            "effect": (("edge", "pair"), scores[-1]),
            "predicted_head": (("layer", "head", "pair"), of_heads[0]),
            "effect_head": (("layer", "head", "pair"), of_heads[1]),
        },
        coords={
            "statistic": list(STATISTICS), "attribution": [*EDGES, HEADS], "bound": ["mean", "low", "high"],
            "of_edge": list(EDGES), "edge": [f"{u} → {v}" for u, v in edges], "pair": np.arange(len(pairs)),
            "layer": model.layers, "head": np.arange(model.n_heads),
        },
        attrs={"level": LEVEL, "pairs": len(pairs), **asked.settings},
    )  # fmt: skip
    if members is None:
        return result
    cases = cases_of(wiring, pairs_of(model, pairs, 1), asked, "resample")
    return result.merge(_of_sets(wiring, cases, edges, members, scores, draws, seed))


def _of_sets(
    wiring: Wiring, cases: list[Case], edges: Edges, members: list[np.ndarray], scores: np.ndarray,
    draws: int, seed: int,
) -> xr.Dataset:  # fmt: skip
    """Sums of scores [method, edge, pair] over the sets of each pair, beside what changing the sets does."""
    most, count = max(map(len, members)), len(members)
    predicted, effect = np.full((len(scores), most, count), np.nan), np.full((most, count), np.nan)
    held, alike = np.zeros((most, len(edges), count), dtype=bool), np.empty((3, len(scores), count))
    for pair, found in enumerate(effects_of_sets(wiring, cases, edges, members)):
        sums = scores[:, :, pair] @ members[pair].T
        predicted[:, : len(found), pair], effect[: len(found), pair] = sums, found
        held[: len(found), :, pair] = members[pair]
        alike[..., pair] = np.stack([_alike(row, found) for row in sums], 1)
    bounded = np.stack(interval(np.moveaxis(alike, -1, 0), draws, seed), -1)
    return xr.Dataset(
        {
            "correlation_set": (("statistic", "of_set", "bound"), bounded),
            "per_pair_set": (("statistic", "of_set", "pair"), alike),
            "predicted_set": (("of_set", "set", "pair"), predicted),
            "effect_set": (("set", "pair"), effect),
            "in_set": (("set", "edge", "pair"), held),
        },
        coords={"of_set": [*EDGES, "exact"]},
    )


def _heads(model: HookedModel, pair: Pairs, asked: Asked) -> np.ndarray:
    """Slope at each gate and drop without each head, [2, layer, head], of one pair's clean prompt."""
    with torch.no_grad():
        told = asked.told(model, pair, *map(outputs_of(model), (pair.clean, pair.corrupt)))
    found = [
        head_importance(model, pair.clean, how, loss=lambda logits, ids: -told.value(logits))
        for how in ("gradient", "ablation")
    ]
    return np.stack([part.values for part in found])


def _correlations(
    predicted: np.ndarray, effect: np.ndarray, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Correlations of the means over pairs [statistic, bound] and within each pair [statistic, pair].

    `predicted` and `effect` are [change, pair].
    """
    count = predicted.shape[1]
    mean = _alike(predicted.mean(1), effect.mean(1))
    per_pair = np.stack([_alike(predicted[:, n], effect[:, n]) for n in range(count)], 1)
    if count < 2:
        return np.stack([mean, mean * np.nan, mean * np.nan], 1), per_pair
    picks = redraws(count, draws, seed)
    drawn = np.stack([_alike(predicted[:, pick].mean(1), effect[:, pick].mean(1)) for pick in picks])
    return np.stack([mean, *bounds(drawn)], 1), per_pair


def _alike(predicted: np.ndarray, effect: np.ndarray) -> np.ndarray:
    """The three statistics of two vectors; NaN where one of them is constant."""
    scales = rankdata, lambda values: rankdata(np.abs(values)), lambda values: values
    return np.array([_pearson(scale(predicted), scale(effect)) for scale in scales])


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / size) if size > 0 else float("nan")
