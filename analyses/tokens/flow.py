"""Attention flow: how much of each input token could reach a position through the layers, as a maximum flow.

Abnar & Zuidema 2020 (arXiv 2005.00928): attention weights are capacities of edges from each position to those of the
layer below, and each input token gets the largest flow from the position to it. One maximum flow per input token on a
graph of up to layers·S² edges: quadratic memory, so long texts are refused. `flow_graph` hands that graph out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import xarray as xr
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor
from tqdm import tqdm

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.positions import Positions, columns_of, position_coordinates
from headwater.analyses.tokens._layer_map import Joining, Reduction, joined_map
from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record

if TYPE_CHECKING:
    import networkx as nx


LONGEST = 1024  # tokens; beyond, the graph of a deep model has tens of millions of edges
UNIT = 2**30  # capacity 1 as an integer: the solver counts in int32, and a position gives out 1 in all


@analysis
def flow(
    record: Record,
    queries: Annotated[Positions, 'positions to explain, e.g. -1; "all" for every one'] = (-1,),
    residual: Annotated[float, "weight of the residual stream against attention", Bounds(0.0, 1.0)] = 0.5,
    heads: Annotated[
        Reduction | Sequence[Sequence[float]], "how the heads of a layer become one map"
    ] = "mean",
    add_residual: Annotated[bool, "mix in the residual stream at all"] = True,
    last_layer: Annotated[int | None, "layer of the position; none: the last one recorded", Bounds(0)] = None,
    normalise: Annotated[bool, "divide each row by its sum"] = True,
) -> xr.DataArray:
    """`F[i, j] = maxflow((L, i) → (0, j))` over the graph with edges (l, i) → (l-1, j) of capacity `Ã_l[i, j]`.

    `Ã_l = rownorm((1 - w)·Ā_l + w·I)` as in `rollout`, with the same settings. Each input token's flow is computed by
    itself; rows are then divided by their sum (`normalise`). At one layer flow equals rollout; an unnormalised flow is
    at most 1 and at most what can enter the token. Capacities are rounded to 2⁻³⁰. Result [batch, query, key]; NaN
    where every path ends in a row without weight. Unit: share. Source: the authors' code and paper, checked.

    Question: How much of each input token can reach a position through the attention of all layers?
    Unit: share of the position, each row sums to 1; unnormalised: the maximum flow, at most 1.
    Source: Abnar & Zuidema 2020, arXiv:2005.00928.
    Cost: one maximum flow per query and input token: seconds for 12 layers × 128 tokens; memory O(layers·S²).
    Not for: what the model uses: it knows neither values nor MLPs; telling tokens apart where most flows reach 1.
    """
    joining = Joining.of(record, residual, heads, add_residual, last_layer)
    columns = columns_of(queries, record.valid, "queries")
    capacities = (_capacities(record, joining) * UNIT).round().to(torch.int32).numpy()
    found = np.full((*columns.shape, record.valid.shape[1]), np.nan)
    for row, real in enumerate(record.valid.numpy()):
        place = np.flatnonzero(real)
        graph = capacities[row][:, place[:, None], place]
        for asked, column in enumerate(tqdm(columns[row].tolist(), desc="flow", unit="query", disable=None)):
            if real[column]:
                start = int(np.searchsorted(place, column))
                found[row, asked] = 0
                found[row, asked, place] = [
                    _largest(graph, start, end, record.causal) for end in range(len(place))
                ]
    if normalise:
        total = found.sum(-1, keepdims=True)
        found = found / np.where(total > 0, total, np.nan)
    return xr.DataArray(
        found,
        dims=("batch", "query", "key"),
        coords=position_coordinates(record, queries, columns),
        name="flow",
        attrs={"layers": joining.layers},
    )


@analysis(like=flow)
def flow_graph(
    record: Record,
    row: int = 0,
    residual: Annotated[float, Bounds(0, 1)] = 0.5,
    heads: Reduction | Sequence[Sequence[float]] = "mean",
    add_residual: bool = True,
    last_layer: int | None = None,
) -> nx.DiGraph:
    """The graph that `flow` is computed on, for one batch row, with its settings: a `networkx.DiGraph`.

    Nodes are (depth, position), depth 0 the input tokens and depth d the positions behind the d-th layer, positions
    those of the real tokens; each has `token`, and `layer` where one wrote it. An edge leads from a position to what it
    looks at, with `capacity` `Ã_l[i, j]` (0: no edge). Question, unit, paper and model stand in `graph.graph`.
    """
    import networkx as nx  # a second of import that only the graph needs

    if not 0 <= row < len(record.valid):
        raise AnalysisError(f"no batch row {row}; the record has rows 0 to {len(record.valid) - 1}")
    joining = Joining.of(record, residual, heads, add_residual, last_layer)
    place = record.valid[row].nonzero()[:, 0]
    capacities = _capacities(record, joining)[row][:, place[:, None], place].numpy()
    words = [record.strings[row][column] for column in place.tolist()]
    graph = nx.DiGraph(layers=joining.layers)
    for depth in range(len(joining.layers) + 1):
        wrote = {"layer": joining.layers[depth - 1]} if depth else {}
        graph.add_nodes_from(((depth, i), {"token": word, **wrote}) for i, word in enumerate(words))
    for depth, i, j in zip(*np.nonzero(capacities), strict=True):
        capacity = float(capacities[depth, i, j])
        graph.add_edge((int(depth) + 1, int(i)), (int(depth), int(j)), capacity=capacity)
    return graph


def _refuse_long(record: Record) -> None:
    longest = int(record.valid.sum(1).max())
    if longest > LONGEST:
        raise AnalysisError(
            f"a text has {longest} tokens and flow takes {LONGEST} at most; shorten it or use rollout"
        )


def _capacities(record: Record, joining: Joining) -> Tensor:
    """Ã of every layer, float64 [batch, layer, query, key]; 0 in rows that have no weight."""
    _refuse_long(record)
    maps = [
        joined_map(record.map(layer), joining.weight, joining.of_layer(depth))
        for depth, layer in enumerate(joining.layers)
    ]
    return torch.stack(maps, 1).nan_to_num()


def _largest(capacities: np.ndarray, start: int, end: int, causal: bool) -> float:
    """Maximum flow from (L, start) to (0, end); `capacities` [layer, query, key] are integers, 1 is `UNIT`."""
    if causal:
        if end > start:
            return 0.0
        # no path leaves the positions between the two
        capacities = capacities[:, end : start + 1, end : start + 1]
        start, end = start - end, 0
    depth, tokens, _ = capacities.shape
    layer, query, key = np.nonzero(capacities)
    edges = coo_array(
        (capacities[layer, query, key], ((layer + 1) * tokens + query, layer * tokens + key)),
        shape=((depth + 1) * tokens,) * 2,
    )
    return maximum_flow(csr_array(edges), depth * tokens + start, end, method="dinic").flow_value / UNIT
