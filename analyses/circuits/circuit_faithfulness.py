"""Faithfulness of a circuit: how much of the model's behaviour remains when only the circuit's edges carry the prompt.

Every edge outside the circuit carries its counterfactual value, and all nodes are recomputed (Hanna, Pezzelle &
Belinkov 2024, arXiv 2403.17806). Completeness is the same score for the complement. Both depend strongly on the
counterfactual (`ablation`). One pass per batch and circuit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

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
from headwater.analyses._streams.redraws import as_variables
from headwater.analyses.circuits._counterfactuals import Case, cases_of, measures_of
from headwater.analyses.circuits._graph_files import (
    circuit_of,
    read_circuit as read_circuit,
    write_circuit as write_circuit,
)
from headwater.analyses.circuits._graphs import edges_of, found_on, mask_of, pruned, select_circuit, wiring_of
from headwater.analyses.circuits.edge_attribution import edge_attribution
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

SMALLEST = 1e-6  # below this difference between the clean and the changed run a share is undefined
SCORES = ("faithfulness", "completeness")


@analysis
def circuit_faithfulness(
    model: HookedModel,
    graph: nx.DiGraph | str | Path | None,
    pairs: Examples | PairExamples,
    corrupt: Examples | None = None,
    measure: PairMeasure = "logit_difference",
    ablation: Annotated[Ablation, "what edges outside of the circuit carry"] = "resample",
    sizes: Annotated[
        int | Sequence[int] | Literal["all"], "numbers of edges to select first; all: the graph as it is"
    ] = "all",
    selection: Annotated[Literal["top", "greedy"], "how edges are selected"] = "top",
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    draws: Draws = 1000,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """`mean`, `low` and `high` [score, size] of faithfulness and completeness, and the measures they come from.

    `faithfulness = (m(circuit) - m(none)) / (m(all) - m(none))`. m(none) is the measure with every edge changed (the
    corrupt run for "resample"), m(all) that of the clean run; each is a mean over pairs. `completeness` is the same
    score of the edges outside the circuit: near 0 if nothing else does the work. Intervals (95 %) resample the pairs.
    Per pair: `measure` [kept, size, pair] of the circuit and of its complement, `whole` and `nothing` [pair], and
    `share` [score, size, pair]. `share` is NaN where whole and nothing differ by less than 1e-6; `undefined` counts
    such pairs. `stability` [size] says how much of each circuit is found again when the pairs that it comes from are
    redrawn, beside chance, as `select_circuit` says.

    `graph` is a circuit, or a file of `write_circuit`, of which only the edges are used. Nodes without a path from the
    embedding or to the logits are removed first. With `sizes` the graph must have scores, and `select_circuit` chooses
    that many edges; the coordinate `edges` holds the number that remained. A circuit that was found on another model of
    the same shape is judged with a warning, and the attribute `found_on` names that model. None: `edge_attribution`
    makes the graph, and without `sizes` its best tenth, quarter and half are tried. Measures and pairs are as in
    `edge_attribution`.

    Question: How much of what the model does is left when only this circuit carries the prompt?
    Unit: share of the measure's difference between clean and corrupt (1: all of it, 0: nothing; may leave 0 to 1).
    Source: Hanna et al. 2024, arXiv:2403.17806; Wang et al. 2023, arXiv:2211.00593; compared with the authors' code.
    Cost: two passes per batch, and two for each size of circuit.
    Not for: comparing circuits judged with different ablations; a circuit's being the only one that does it.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> clean = "When Mary and John went to the store , John gave a drink to"
    >>> corrupt = "When Mary and John went to the store , Mary gave a drink to"
    >>> found = hw.analyses.circuit_faithfulness(model, None, [(clean, corrupt)], sizes=[200, 1519], draws=10)
    >>> found["mean"].sel(score="faithfulness").round(1).values.tolist()
    [0.8, 1.0]
    """
    pairs = side_by_side(model, pairs, corrupt)
    listed = _listed(sizes)
    if graph is None:
        graph = edge_attribution(model, pairs, measure=measure, answer=answer, wrong=wrong, position=position)
        count = len(edges_of(graph))
        listed = [count // 10, count // 4, count // 2] if listed is None else listed
    graph = circuit_of(graph)
    wiring = wiring_of(model, graph)
    mask_of(wiring, graph)  # refuses edges that the model does not have, before pruning can remove them
    circuits = [pruned(graph)] if listed is None else [select_circuit(graph, n, selection) for n in listed]
    masks = torch.stack([mask_of(wiring, circuit) for circuit in circuits])
    asked = Asked(measure, answer, wrong, position)
    cases = cases_of(wiring, pairs_of(model, pairs, batch_size), asked, ablation)
    result = _summary(*_measures(wiring, cases, masks, len(pairs)), draws, seed)
    counts = masks.sum((1, 2)).tolist()
    result = result.assign_coords(size=listed or counts, edges=("size", counts))
    again, by_chance, over = as_variables(circuits)
    result = result.assign(stability=("size", again), stability_by_chance=("size", by_chance))
    told = {"pairs": len(pairs), "edges_of_model": int(wiring.edges().sum()), "level": LEVEL}
    told["stability_over"] = over
    return result.assign_attrs({**told, **asked.settings, **found_on(model, graph)})


def _listed(sizes: int | Sequence[int] | Literal["all"]) -> list[int] | None:
    """The sizes as a list; None for the graph as it is."""
    found = None if sizes == "all" else np.atleast_1d(sizes).tolist()
    if found == []:
        raise AnalysisError("sizes is empty; give a number of edges, a list of them, or 'all'")
    return found


def _measures(
    wiring: Wiring, cases: list[Case], masks: Tensor, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The measure: clean and with all edges changed [pair], of circuits and complements [kept, size, pair]."""
    known = wiring.edges()
    changes = torch.cat([known[None], known & ~masks, masks])
    whole = np.zeros(count)
    for case in cases:
        whole[case.pairs.places] = case.told.clean
    found = measures_of(wiring, cases, changes, "circuit faithfulness")
    return whole, found[0], found[1:].reshape(2, len(masks), count)


def _summary(
    whole: np.ndarray, nothing: np.ndarray, measures: np.ndarray, draws: int, seed: int
) -> xr.Dataset:
    apart = whole - nothing
    defined = np.abs(apart) >= SMALLEST
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(defined, (measures - nothing) / apart, np.nan)
        mean = _ratio(measures, nothing, apart)
        picks = redraws(len(whole), draws, seed)
        drawn = np.stack([_ratio(measures[..., pick], nothing[pick], apart[pick]) for pick in picks])
    if not np.isfinite(mean).all():
        raise AnalysisError(
            "the measure is the same on the clean run and with every edge changed, so no share of the difference is "
            "defined; give pairs whose answers differ"
        )
    low, high = bounds(drawn, np.nanquantile) if len(whole) > 1 else (mean * np.nan,) * 2
    dims = ("score", "size")
    return xr.Dataset(
        {
            "mean": (dims, mean),
            "low": (dims, low),
            "high": (dims, high),
            "share": ((*dims, "pair"), share),
            "measure": (("kept", "size", "pair"), measures, {"unit": "that of the measure"}),
            "whole": (("pair",), whole, {"unit": "that of the measure"}),
            "nothing": (("pair",), nothing, {"unit": "that of the measure"}),
        },
        coords={"score": list(SCORES), "kept": ["circuit", "complement"], "pair": np.arange(len(whole))},
        attrs={"undefined": int((~defined).sum())},
    )


def _ratio(measures: np.ndarray, nothing: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """The mean share of the difference between the clean run and the run with every edge changed."""
    whole = apart.mean()
    return (measures - nothing).mean(-1) / (whole if abs(whole) >= SMALLEST else np.nan)
