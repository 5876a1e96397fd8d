"""Faithfulness of circuits of every size, and its two areas: the measures by which the Mechanistic Interpretability
Benchmark judges how well a method finds circuits.

Mueller et al. 2025 (arXiv 2504.13151). Edges are chosen by score from .1 % of all to all, what is not connected is
pruned, and edges outside carry counterfactual values. CPR is the area below the curve, CMD the area between the curve
and 1. The formulas follow the benchmark's own evaluator, which runs on TransformerLens alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import networkx as nx
import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Draws, Seed
from headwater.analyses._measures.bootstrap import LEVEL, bounds, redraws
from headwater.analyses._measures.measure import AnswerSetting, PositionSetting, WrongSetting
from headwater.analyses._measures.pair_scores import Asked, PairMeasure
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.pairs import PairExamples, pairs_of, side_by_side
from headwater.analyses._streams.component_graph import Wiring
from headwater.analyses._streams.ranked_edges import best_first, greedily, scores_of
from headwater.analyses._streams.redraws import Redraws
from headwater.analyses.circuits._counterfactuals import cases_of, measures_of
from headwater.analyses.circuits._graph_files import circuit_of
from headwater.analyses.circuits._graphs import (
    connected,
    edges_of,
    found_on,
    mask_of,
    places_of,
    select_circuit,
    wiring_of,
)
from headwater.analyses.circuits.edge_attribution import edge_attribution
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RANKINGS = ("signed", "absolute")
CHOICES: tuple[Literal["top", "greedy"], ...] = ("top", "greedy")
SMALLEST = 1e-6  # below this difference between the clean and the changed run a share is undefined


@analysis
def circuit_curve(
    model: HookedModel,
    graph: nx.DiGraph | str | Path | None,
    pairs: Examples | PairExamples,
    corrupt: Examples | None = None,
    measure: PairMeasure = "logit_difference",
    ablation: Annotated[Ablation, "what edges outside of the circuit carry"] = "resample",
    selection: Annotated[Literal["top", "greedy"], "how edges are selected"] = "top",
    known: Annotated[
        nx.DiGraph | str | Path | None, "file of the true circuit, for the AUROC; none: no AUROC"
    ] = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    draws: Draws = 1000,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """`f` [ranking, share, bound] of circuits of growing size, `cpr` [bound] and `cmd` [bound].

    `f = (m(circuit) - m(none)) / (m(all) - m(none))`, as the faithfulness of `circuit_faithfulness`: m is a mean over
    pairs. The shares s are those of the benchmark: .001, .002, .005, .01, .02, .05, .1, .2, .5 and 1. A circuit holds
    the best `floor(s·n)` of all n edges of the model, less those that no path joins to the embedding and to the logits.
    The ranking is by "signed" scores or by their "absolute" size, `selection` as in `select_circuit`. `edges`
    [ranking, share] counts those that remain. Of a graph whose nodes alone have scores the shares are parts of these
    nodes. `cpr = ∫ f ds` is of the signed ranking, `cmd = ∫ |1 - f| ds` of the absolute one; both are sums of
    trapezoids over s as it is, from .001 to 1: four fifths of either lie above s = .2. Bounds: "mean", and "low" and
    "high" with 95 % of the values of resampled pairs (NaN for one pair). Per pair: `measure` [ranking, share, pair],
    `whole` and `nothing` [pair]. `stability` [ranking, share] says how much of each circuit is found again when the
    pairs of the graph are redrawn, beside chance, as `select_circuit` says.

    With `known`, a circuit that is known to be the true one: `true_positive` and `false_positive` [choice, share] are
    parts of its edges, and of the other edges, that are found among the best `ceil(s·n)` by size, chosen "top" or
    "greedy" and pruned; `auroc` [choice] is the area below them (the benchmark's is greedy), from the first share on.

    `graph` is one of `edge_attribution` or any other with scores, or its file; judge it on pairs that it was not made
    from. None: `edge_attribution` makes it from these pairs. One that was found on another model is judged with a
    warning and named in `found_on`. Measures and pairs are as in `edge_attribution`.

    Question: How fast do the best edges of a ranking regain what the model does?
    Unit: share of the measure's difference between clean and corrupt; cpr and cmd: its mean over shares (about).
    Source: Mueller et al. 2025, arXiv:2504.13151; the formulas are those of the authors' released evaluator.
    Cost: two passes per batch, and one for each share and ranking whose circuit differs, some together.
    Not for: ranking methods by cpr alone: f may exceed 1, and masks trained for it do (cmd can not be raised so);
    comparing values of different models, measures or ablations.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> clean = "When Mary and John went to the store , John gave a drink to"
    >>> corrupt = "When Mary and John went to the store , Mary gave a drink to"
    >>> found = hw.analyses.circuit_curve(model, None, [(clean, corrupt)], draws=10)
    >>> found.f.sel(ranking="absolute", bound="mean").round(1).values.tolist()[-2:]
    [1.0, 1.0]
    """
    pairs = side_by_side(model, pairs, corrupt)
    asked = Asked(measure, answer, wrong, position)
    if graph is None:
        graph = edge_attribution(model, pairs, measure=measure, answer=answer, wrong=wrong, position=position)
    graph = circuit_of(graph)
    wiring = wiring_of(model, graph)
    chosen = torch.cat([_circuits(wiring, graph, selection, ranking == "signed") for ranking in RANKINGS])
    masks = connected(wiring, chosen)
    cases = cases_of(wiring, pairs_of(model, pairs, batch_size), asked, ablation)
    everything = wiring.edges()[None]
    found = measures_of(wiring, cases, torch.cat([everything, everything & ~masks]), "circuit curve")
    whole = np.zeros(len(pairs))
    for case in cases:
        whole[case.pairs.places] = case.told.clean
    measures = found[1:].reshape(len(RANKINGS), len(SHARES), -1)
    result = _summary(whole, found[0], measures, draws, seed)
    counts = masks.sum((1, 2)).reshape(len(RANKINGS), -1).numpy()
    result = result.assign(edges=(("ranking", "share"), counts, {"unit": "edges"}))
    again = [Redraws.of(graph, ranking == "signed") for ranking in RANKINGS]
    both = np.array(
        [each.shares([int(share * len(each.names)) for share in SHARES], selection) for each in again]
    )
    for place, name in enumerate(("stability", "stability_by_chance")):
        result = result.assign({name: (("ranking", "share"), both[..., place])})
    if known is not None:
        result = result.merge(_against(wiring, graph, mask_of(wiring, circuit_of(known))))
    told = {"pairs": len(pairs), "edges_of_model": int(everything.sum()), "level": LEVEL}
    told["stability_over"] = again[0].over(selection)
    return result.assign_attrs({**told, **asked.settings, **found_on(model, graph)})


def _circuits(
    wiring: Wiring, graph: nx.DiGraph, selection: Literal["top", "greedy"], signed: bool,
    rounded: Any = int,
) -> Tensor:  # fmt: skip
    """The edges of the circuit of each share before pruning, [share, node, input]."""
    scores, of_nodes = scores_of(graph, signed)
    if not of_nodes and (there := len(edges_of(graph))) > len(scores):
        raise AnalysisError(
            f"{len(scores)} of the {there} edges of the graph have a score, and a curve ranks all; give a graph "
            "of edge_attribution without sample="
        )
    places_of(wiring, edges_of(graph))  # refuses edges that the model does not have, whether chosen or not
    everything = wiring.edges()
    found = everything.new_zeros(len(SHARES), *everything.shape)
    if of_nodes:
        for place, share in enumerate(SHARES):
            found[place] = mask_of(wiring, select_circuit(graph, rounded(share * len(scores)), signed=signed))
        return found
    count = int(everything.sum())
    order = best_first(scores) if selection == "top" else greedily(graph, scores, count)
    places = places_of(wiring, order)
    for place, share in enumerate(SHARES):
        found[place][tuple(places[: rounded(share * count)].T)] = True
    return found


def _summary(
    whole: np.ndarray, nothing: np.ndarray, measures: np.ndarray, draws: int, seed: int
) -> xr.Dataset:
    def values(pick: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        apart = (whole[pick] - nothing[pick]).mean()
        f = (measures[..., pick] - nothing[pick]).mean(-1) / (apart if abs(apart) >= SMALLEST else np.nan)
        return f, np.trapezoid(f[0], SHARES), np.trapezoid(np.abs(1 - f[1]), SHARES)

    means = values(slice(None))
    if not np.isfinite(means[0]).all():
        raise AnalysisError(
            "the measure is the same on the clean run and with every edge changed, so no share of the difference is "
            "defined; give pairs whose answers differ"
        )
    drawn = zip(*map(values, redraws(len(whole), draws, seed)), strict=True)
    spread = [bounds(np.stack(each), np.nanquantile) for each in drawn] if len(whole) > 1 else None
    f, cpr, cmd = (
        np.stack([mean, *(spread[n] if spread else [mean * np.nan] * 2)], -1) for n, mean in enumerate(means)
    )
    return xr.Dataset(
        {
            "f": (("ranking", "share", "bound"), f),
            "cpr": (("bound",), cpr),
            "cmd": (("bound",), cmd),
            "measure": (("ranking", "share", "pair"), measures, {"unit": "that of the measure"}),
            "whole": (("pair",), whole, {"unit": "that of the measure"}),
            "nothing": (("pair",), nothing, {"unit": "that of the measure"}),
        },
        coords={
            "ranking": list(RANKINGS), "share": list(SHARES), "bound": ["mean", "low", "high"],
            "pair": np.arange(len(whole)),
        },
    )  # fmt: skip


def _against(wiring: Wiring, graph: nx.DiGraph, true: Tensor) -> xr.Dataset:
    """How many edges of a true circuit, and how many others, are found at each share, and the area below."""
    rest = wiring.edges() & ~true
    if not true.any() or not rest.any():
        raise AnalysisError(
            "known holds none or all of the model's edges, so there is nothing to tell apart; give the true circuit"
        )
    rates = []
    for choice in CHOICES:
        found = connected(wiring, _circuits(wiring, graph, choice, signed=False, rounded=math.ceil))
        rates.append([((found & of).sum((1, 2)).double() / of.sum()).numpy() for of in (true, rest)])
    hits, misses = np.stack(rates, 1)
    return xr.Dataset(
        {
            "true_positive": (("choice", "share"), hits, {"unit": "part of the true edges"}),
            "false_positive": (("choice", "share"), misses, {"unit": "part of the other edges"}),
            "auroc": (
                ("choice",),
                np.trapezoid(hits, misses, axis=1),
                {"unit": "area, 0.5 by chance (about)"},
            ),
        },
        coords={"choice": list(CHOICES), "share": list(SHARES)},
    )
