"""Whether attributions foretell what the change they stand for does, by making that change: of every edge and head.

The attribution of an edge is a first-order guess of how far the measure falls when the edge carries the corrupt
prompt; here each edge is changed by itself and the guesses are held to what happens (EAP of Syed et al. 2023, EAP-IG of
Hanna et al. 2024; the study is ours). The same for heads: the slope at a head's gate (Michel et al. 2019) beside its
removal. What it leaves out: changes of several edges together, for which `circuit_faithfulness` is.
"""

from __future__ import annotations

from typing import Annotated, Any

import networkx as nx
import numpy as np
import torch
import xarray as xr
from scipy.stats import rankdata
from tqdm import tqdm

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.bootstrap import LEVEL, bounds, redraws
from headwater.analyses._measures.measure import Answer, AnswerSetting, PositionSetting, WrongSetting
from headwater.analyses._measures.pair_scores import Asked, PairMeasure
from headwater.analyses._prompts.pairs import PairExamples, pairs_of
from headwater.analyses.circuits.edge_attribution import edge_attribution
from headwater.analyses.heads.head_importance import head_importance
from headwater.lens.model import HookedModel

EDGES: dict[str, dict[str, Any]] = {
    "eap": {"how": "inputs", "steps": 1},
    "eap_ig_inputs": {"how": "inputs"},
    "eap_ig_activations": {"how": "activations"},
    "clean_corrupt": {"how": "clean_corrupt"},
}
HEADS = "gate_slope"
STATISTICS = ("spearman", "spearman_size", "pearson")


@analysis
def attribution_truth(
    model: HookedModel,
    pairs: PairExamples,
    measure: PairMeasure = "logit_difference",
    steps: Annotated[int, "points between corrupt and clean of EAP-IG", Bounds(2, 1000)] = 5,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    draws: Annotated[int, "resamples of the pairs for the interval", Bounds(1)] = 1000,
    seed: Annotated[int, "seed of the resampling", Bounds(0)] = 0,
) -> xr.Dataset:
    """`correlation` [statistic, attribution, bound] between predicted and real effects, both means over pairs.

    Methods of edges: "eap", "eap_ig_inputs", "eap_ig_activations", "clean_corrupt", each against the exact drop
    `m(clean) - m(clean with the edge carrying the corrupt prompt)`, as in `edge_attribution`. Of heads: "gate_slope",
    |∂m/∂ξ| at the gates of the clean prompt, against the drop when the head's output is zero (`head_importance`).
    Statistics: Spearman's ρ of the values, of their sizes (absolute values), and Pearson's r. Bounds: "mean", and "low"
    and "high", between which 95 % of the values of redrawn pairs lie (NaN for one pair).
    `per_pair` [statistic, attribution, pair] is that within each pair, NaN where an effect is the same for all.
    `predicted` [of_edge, edge, pair], `effect` [edge, pair], `predicted_head` and `effect_head` [layer, head, pair].

    Pairs and measure are those of `edge_attribution`; a measure is asked of one pair at a time.
    Unit: none; that of the measure. Source: formulas of both analyses; the comparison is ours.

    Question: Do attributions foretell what changing each edge, or removing each head, does to the measure?
    Unit: correlation, -1 to 1; predicted and effect: that of the measure (positive: the edge or head helps).
    Source: ours; of Syed et al. 2023, arXiv:2310.10348; Hanna et al. 2024, arXiv:2403.17806; Michel et al. 2019.
    Cost: a forward pass per edge, head and pair (1,519 edges of 30 tokens: 4 s on two cores).
    Not for: judging sets of edges (circuit_faithfulness); edges that back each other up look needless in truth too.
    """
    asked = Asked(measure, answer, wrong, position)
    pairs_of(model, pairs, 1)  # says what is wrong with any of them before the long part
    edges: list[tuple[str, str]] = []
    rows, heads = [], []
    for place in tqdm(range(len(pairs)), desc="attribution truth", unit="pair", disable=None):
        mine = Asked(measure, _of(answer, place), _of(wrong, place), position)
        one = [pairs[place]]
        settings = {"answer": mine.answer, "wrong": mine.wrong, "position": position}
        graphs = [
            edge_attribution(model, one, measure, **{"steps": steps} | how, **settings)
            for how in (*EDGES.values(), {"how": "exact"})
        ]
        edges = [(u, v) for u, v, score in graphs[0].edges(data="score") if score is not None]
        rows.append([_scores(graph, edges) for graph in graphs])
        heads.append(_heads(model, one, mine))
    scores = np.moveaxis(np.array(rows), 0, -1)  # [method and exact, edge, pair]
    of_heads = np.moveaxis(np.stack(heads), 0, -1)  # [slope and effect, layer, head, pair]
    guesses = [(scores[n], scores[-1]) for n in range(len(EDGES))]
    guesses.append((of_heads[0].reshape(-1, len(pairs)), of_heads[1].reshape(-1, len(pairs))))
    bounds, per_pair = zip(*(_correlations(*both, draws, seed) for both in guesses), strict=True)
    return xr.Dataset(
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


def _of(given: Answer | None, place: int) -> Answer | None:
    """The answer of one pair, of one for all or one per pair."""
    if given is None or isinstance(given, str) or len(given) == 1:
        return given
    return list(given)[place : place + 1]  # type: ignore[return-value]


def _scores(graph: nx.DiGraph, edges: list[tuple[str, str]]) -> list[float]:
    return [graph.edges[edge]["score"] for edge in edges]


def _heads(model: HookedModel, one: PairExamples, asked: Asked) -> np.ndarray:
    """Slope at each gate and drop without each head, [2, layer, head], of one pair's clean prompt."""
    (pair,) = pairs_of(model, one)
    with torch.no_grad():
        told = asked.told(model, pair, model(pair.clean), model(pair.corrupt))
    found = [
        head_importance(model, pair.clean, how, loss=lambda logits, ids: -told.value(logits))
        for how in ("gradient", "ablation")
    ]
    return np.stack([part.values for part in found])


def _correlations(
    predicted: np.ndarray, effect: np.ndarray, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """[statistic, bound] of the means over pairs, and [statistic, pair], of [change, pair]."""
    count = predicted.shape[1]
    mean = _alike(predicted.mean(1), effect.mean(1))
    per_pair = np.stack([_alike(predicted[:, n], effect[:, n]) for n in range(count)], 1)
    if count < 2:
        return np.stack([mean, mean * np.nan, mean * np.nan], 1), per_pair
    picks = redraws(count, draws, seed)
    drawn = np.stack([_alike(predicted[:, pick].mean(1), effect[:, pick].mean(1)) for pick in picks])
    return np.stack([mean, *bounds(drawn)], 1), per_pair


def _alike(predicted: np.ndarray, effect: np.ndarray) -> np.ndarray:
    """The three statistics of two rows of numbers; NaN where one of them is constant."""
    sides = (
        (rankdata(predicted), rankdata(effect)),
        (rankdata(np.abs(predicted)), rankdata(np.abs(effect))),
        (predicted, effect),
    )
    return np.array([_pearson(*both) for both in sides])


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / size) if size > 0 else float("nan")
