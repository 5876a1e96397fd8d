"""Sets of edges that are changed together, of each pair its own: drawn at random or given, and their effects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx
import numpy as np
import torch

from headwater.analyses._streams.component_graph import Wiring
from headwater.analyses.circuits._counterfactuals import Case, changed
from headwater.analyses.circuits._graphs import edges_of, places_of
from headwater.lens.errors import AnalysisError
from headwater.lens.progress import progress

ROWS = 64  # sets in one forward pass

Edges = Sequence[tuple[str, str]]


def drawn_sets(edges: Edges, pairs: int, sets: int, share: float, seed: int) -> list[np.ndarray]:
    """Of each pair, which of `edges` its sets hold, bool [set, edge]; every set holds as many, drawn anew."""
    rng, size = np.random.default_rng(seed), max(1, round(share * len(edges)))
    found = np.zeros((pairs, sets, len(edges)), dtype=bool)
    for held in found.reshape(-1, len(edges)):
        held[rng.choice(len(edges), size, replace=False)] = True
    return list(found)


def given_sets(wiring: Wiring, edges: Edges, known: Any, pairs: int) -> list[np.ndarray]:
    """Of each pair, which of `edges` its sets hold, bool [set, edge]; a set is a circuit or a list of edges."""
    if not isinstance(known, Sequence) or len(known) != pairs:
        raise AnalysisError(f"known holds sets of edges for each pair; give a list of {pairs}, one per pair")
    place = {edge: number for number, edge in enumerate(edges)}
    found = [np.zeros((len(sets), len(edges)), dtype=bool) for sets in known]
    for pair, sets in enumerate(known):
        for number, one in enumerate(sets):
            held = edges_of(one) if isinstance(one, nx.DiGraph) else [(u, v) for u, v in one]
            places_of(wiring, held)  # refuses edges that the model does not have
            if not held:
                raise AnalysisError(f"set {number} of pair {pair} is empty; give at least one edge")
            found[pair][number, [place[edge] for edge in held]] = True
    return found


def effects_of_sets(
    wiring: Wiring, cases: list[Case], edges: Edges, members: list[np.ndarray]
) -> list[np.ndarray]:
    """How far the measure of each pair falls when a set is changed, [set] of each pair. A case holds one pair."""
    found = [np.empty(0)] * len(members)
    at = places_of(wiring, edges).T
    for case in progress(cases, desc="sets of edges", unit="pair"):
        (pair,) = case.pairs.places
        masks = torch.zeros(len(members[pair]), *wiring.edges().shape, dtype=torch.bool)
        masks[:, at[0], at[1]] = torch.from_numpy(members[pair])
        parts = [changed(wiring, case, some)[:, 0].double().cpu() for some in masks.split(ROWS) if len(some)]
        found[pair] = (case.told.clean - torch.cat([*parts, torch.empty(0).double()])).numpy()
    return found
