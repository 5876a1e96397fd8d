"""Faithfulness of a circuit: how much of what a model does is left when only the circuit's edges carry the prompt.

Every edge outside of the circuit carries its corrupt value and all nodes are computed anew (Hanna, Pezzelle &
Belinkov 2024, arXiv 2403.17806); completeness is the same of all other edges. Values depend strongly on what
the changed edges carry, so that stands in the attributes. One pass per batch and circuit.
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
from tqdm import tqdm

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.bootstrap import LEVEL, bounds, redraws
from headwater.analyses._measures.measure import AnswerSetting, PositionSetting, WrongSetting
from headwater.analyses._measures.pair_scores import Asked, PairMeasure
from headwater.analyses._prompts.pairs import PairExamples, pairs_of
from headwater.analyses._streams.component_graph import Wiring
from headwater.analyses.circuits._counterfactuals import cases_of, changed
from headwater.analyses.circuits._graph_files import (
    circuit_of,
    read_circuit as read_circuit,
    write_circuit as write_circuit,
)
from headwater.analyses.circuits._graphs import edges_of, mask_of, pruned, select_circuit, wiring_of
from headwater.analyses.circuits.edge_attribution import edge_attribution
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

SMALLEST = 1e-6  # difference between clean and changed run below which a share of it is not defined
SCORES = ("faithfulness", "completeness")


@analysis
def circuit_faithfulness(
    model: HookedModel,
    graph: nx.DiGraph | str | Path | None,
    pairs: PairExamples,
    measure: PairMeasure = "logit_difference",
    ablation: Annotated[Ablation, "what edges outside of the circuit carry"] = "resample",
    sizes: Annotated[
        int | Sequence[int] | Literal["all"], "numbers of edges to select first; all: the graph as it is"
    ] = "all",
    selection: Annotated[Literal["top", "greedy"], "how edges are selected"] = "top",
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    draws: Annotated[int, "resamples of the pairs for the interval", Bounds(1)] = 1000,
    seed: Annotated[int, "seed of the resampling", Bounds(0)] = 0,
    batch_size: Annotated[int, "pairs of equal length that run together", Bounds(1)] = 16,
) -> xr.Dataset:
    """`mean`, `low` and `high` [score, size] of faithfulness and completeness, with the measures they come from.

    `faithfulness = (m(circuit) - m(none)) / (m(all) - m(none))` with m(none) the measure when every edge is changed
    (the corrupt run for "resample") and m(all) that of the clean run, each a mean over pairs; `completeness` is the
    same of the edges that are not in the circuit: near 0 where nothing else does the work. Intervals (95 %) redraw the
    pairs. Per pair: `measure` [edges, size, pair] of the circuit and of its complement, `whole` and `nothing` [pair],
    and `share` [score, size, pair], NaN where whole and nothing differ by less than 1e-6 (counted in `undefined`).

    `graph` is a circuit (nodes that nothing leads to, or that lead to nothing, are left out), or a file of
    `write_circuit`, which is read for its edges alone; with `sizes` it must have scores, of which `select_circuit`
    takes so many first: the coordinate `edges` says how many were left. None: `edge_attribution` is asked first, and
    without sizes its best tenth, quarter and half are tried. Measures and pairs are those of `edge_attribution`.
    Unit: share of the difference. Source: the authors' code, checked.

    Question: How much of what the model does is left when only this circuit carries the prompt?
    Unit: share of the measure's difference between clean and corrupt (1: all of it, 0: nothing; may leave 0 to 1).
    Source: Hanna et al. 2024, arXiv:2403.17806; Wang et al. 2023, arXiv:2211.00593.
    Cost: two passes per batch, and two for each size of circuit.
    Not for: comparing circuits judged with different ablations; a circuit's being the only one that does it.
    """
    listed = _listed(sizes)
    if graph is None:
        graph = edge_attribution(model, pairs, measure, answer=answer, wrong=wrong, position=position)
        count = len(edges_of(graph))
        listed = [count // 10, count // 4, count // 2] if listed is None else listed
    graph = circuit_of(graph)
    wiring = wiring_of(model, graph)
    mask_of(wiring, graph)  # an edge that the model does not have is named, also where pruning would hide it
    circuits = [pruned(graph)] if listed is None else [select_circuit(graph, n, selection) for n in listed]
    masks = torch.stack([mask_of(wiring, circuit) for circuit in circuits])
    asked = Asked(measure, answer, wrong, position)
    found = _measures(wiring, pairs, asked, ablation, masks, batch_size)
    whole, nothing, kept, others = (part.numpy() for part in found)
    result = _summary(whole, nothing, kept, others, draws, seed)
    counts = masks.sum((1, 2)).tolist()
    result = result.assign_coords(size=listed or counts, edges=("size", counts))
    told = {"pairs": len(pairs), "edges_of_model": int(wiring.edges().sum()), "level": LEVEL}
    return result.assign_attrs({**told, **asked.settings})


def _listed(sizes: int | Sequence[int] | Literal["all"]) -> list[int] | None:
    """The sizes one by one; None for the graph as it is."""
    found = None if sizes == "all" else np.atleast_1d(sizes).tolist()
    if found == []:
        raise AnalysisError("sizes is empty; give a number of edges, a list of them, or 'all'")
    return found


def _measures(
    wiring: Wiring,
    pairs: PairExamples,
    asked: Asked,
    ablation: Ablation,
    masks: Tensor,
    batch_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Measures of the clean run and the run with all edges changed [pair], of circuits and complements [size, pair]."""
    known = wiring.edges()
    whole, nothing = (torch.zeros(len(pairs), dtype=torch.float64) for _ in range(2))
    kept, others = (torch.zeros(len(masks), len(pairs), dtype=torch.float64) for _ in range(2))
    cases = cases_of(wiring, pairs_of(wiring.model, pairs, batch_size), asked, ablation)
    for case in tqdm(cases, desc="circuit faithfulness", unit="batch", disable=None):
        mine = case.pairs.places
        whole[mine] = case.told.clean
        nothing[mine] = changed(wiring, case, known[None])[0].double().cpu()
        for place, mask in enumerate(masks):
            kept[place, mine] = changed(wiring, case, (known & ~mask)[None])[0].double().cpu()
            others[place, mine] = changed(wiring, case, mask[None])[0].double().cpu()
    return whole, nothing, kept, others


def _summary(
    whole: np.ndarray, nothing: np.ndarray, kept: np.ndarray, others: np.ndarray, draws: int, seed: int
) -> xr.Dataset:
    measures = np.stack([kept, others])  # [score, size, pair]
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
    whole = apart.mean()
    return (measures - nothing).mean(-1) / (whole if abs(whole) >= SMALLEST else np.nan)
