"""Attention flow: how much of each input token could reach a position through the layers, as a maximum flow.

Abnar & Zuidema 2020 (arXiv 2005.00928). Attention weights are the capacities of edges from each position to the
positions of the layer below. Each input token gets the largest flow from the position to it. The graph has up to
layers·S² edges, so memory is quadratic and long texts are refused. `flow_graph` returns that graph.
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

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.graph import Graph
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.positions import Positions, columns_of
from headwater.analyses.tokens._layer_map import Mixers, Reduction
from headwater.analyses.tokens._map_steps import Steps
from headwater.analyses.tokens._sinks_aside import Without, WithoutSetting
from headwater.lens.errors import AnalysisError
from headwater.lens.progress import progress
from headwater.lens.records.record import Record

if TYPE_CHECKING:
    import networkx as nx


LONGEST = 1024  # tokens; beyond, the graph of a deep model has tens of millions of edges
UNIT = 2**30  # capacity 1 as an integer: the solver counts in int32, and a position gives out 1 in all


@analysis(maps="square")
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
    mixers: Annotated[
        Mixers, "layers without attention: refused, or followed by their exact maps"
    ] = "refuse",
    without: WithoutSetting = None,
) -> xr.DataArray:
    """`F[i, j] = maxflow((L, i) → (0, j))` over the graph with edges (l, i) → (l-1, j) of capacity `Ã_l[i, j]`.

    `Ã_l = rownorm((1 - w)·Ā_l + w·I)` as in `rollout`, with the same settings. Each input token's flow is computed by
    itself; `normalise` then divides rows by their sum. With one layer, flow equals rollout. An unnormalised flow is at
    most 1 and at most what can enter the token. Capacities are rounded to 2⁻³⁰. Result [batch, query, key]; NaN where
    every path ends in a row without weight.

    `mixers="effective"` follows layers without attention by the shares of their exact maps, and `without="sinks"` sets
    sinks aside in the capacities, both as `rollout` says. The attribute `one_token` names a token that holds more than
    0.9 of every answer. A decoder with cross-attention is followed with what it looks at, over the tokens of both
    sides, as in `rollout`: a layer of cross-attention leads from a position to itself and to the source's tokens.

    Question: How much of each input token can reach a position through the attention of all layers?
    Unit: share of the position, each row sums to 1; unnormalised: the maximum flow, at most 1.
    Source: Abnar & Zuidema 2020, arXiv:2005.00928; held to the authors' code.
    Cost: one maximum flow per query and input token: seconds for 12 layers × 128 tokens; memory O(layers·S²).
    Not for: what the model uses: it knows neither values nor MLPs; telling tokens apart where most flows reach 1.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> record = model.record("When Mary and John went to the store , John gave a drink to")
    >>> found = hw.analyses.flow(record)
    >>> found.shape, found.key_token.values[0, found[0, 0].values.argmax()].item()
    ((1, 1, 15), 'Mary')
    """
    steps = Steps.of(record, residual, heads, add_residual, last_layer, mixers, without)
    columns = columns_of(queries, record.valid, "queries")
    capacities = (_capacities(steps) * UNIT).round().to(torch.int32).numpy()
    found = np.full((*columns.shape, steps.valid.shape[1]), np.nan)
    for row, real in enumerate(steps.valid.numpy()):
        place = np.flatnonzero(real)
        graph = capacities[row][:, place[:, None], place]
        for asked, column in enumerate(progress(columns[row].tolist(), desc="flow", unit="query")):
            if record.valid[row, column]:
                start = int(np.searchsorted(place, steps.offset + column))
                found[row, asked] = 0
                found[row, asked, place] = [
                    _largest(graph, start, end, steps.causal) for end in range(len(place))
                ]
    total = found.sum(-1, keepdims=True)
    shares = found / np.where(total > 0, total, np.nan)
    return xr.DataArray(
        shares if normalise else found,
        dims=("batch", "query", "key"),
        coords=steps.coordinates(queries, columns),
        name="flow",
        attrs=steps.told | steps.one_token(shares, columns),
    )


@analysis(like=flow)
def flow_graph(
    record: Record,
    row: int = 0,
    residual: Annotated[float, Bounds(0, 1)] = 0.5,
    heads: Reduction | Sequence[Sequence[float]] = "mean",
    add_residual: bool = True,
    last_layer: int | None = None,
    mixers: Mixers = "refuse",
    without: Without = None,
) -> nx.DiGraph:
    """The graph of `flow` for one batch row, with the same settings, as a `networkx.DiGraph`.

    Nodes are (depth, position): depth 0 holds the input tokens, depth d the outputs of the d-th layer; positions are
    those of the real tokens. Each node has `token`, and `layer` above depth 0. An edge leads from a position to one
    that it looks at; its `capacity` is `Ã_l[i, j]` (no edge where that is 0). Of a decoder with cross-attention the
    layers are those of the source, then its own in their order, and positions count the source's tokens first.
    `graph.graph` holds question, unit, paper and model.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> record = model.record("When Mary and John went to the store , John gave a drink to")
    >>> graph = hw.analyses.flow_graph(record)
    >>> graph.number_of_nodes(), graph.nodes[0, 2]["token"], graph.graph["layers"]
    (75, 'Mary', '[0, 1, 2, 3]')
    """

    if not 0 <= row < len(record.valid):
        raise AnalysisError(f"no batch row {row}; the record has rows 0 to {len(record.valid) - 1}")
    steps = Steps.of(record, residual, heads, add_residual, last_layer, mixers, without)
    place = steps.valid[row].nonzero()[:, 0]
    capacities = _capacities(steps)[row][:, place[:, None], place].numpy()
    words = [steps.strings[row][column] for column in place.tolist()]
    graph = Graph(**steps.told)
    for depth in range(len(steps.steps) + 1):
        wrote = {"layer": steps.steps[depth - 1].layer} if depth else {}
        graph.add_nodes_from(((depth, i), {"token": word, **wrote}) for i, word in enumerate(words))
    for depth, i, j in zip(*np.nonzero(capacities), strict=True):
        capacity = float(capacities[depth, i, j])
        graph.add_edge((int(depth) + 1, int(i)), (int(depth), int(j)), capacity=capacity)
    return graph


def _capacities(steps: Steps) -> Tensor:
    """The matrix of every step, float64 [batch, step, query, key]; 0 in rows without weight."""
    longest = int(steps.valid.sum(1).max())
    if longest > LONGEST:
        raise AnalysisError(
            f"a text has {longest} tokens and flow takes {LONGEST} at most; shorten it or use rollout"
        )
    return torch.stack(list(steps.dense_steps()), 1).nan_to_num()


def _largest(capacities: np.ndarray, start: int, end: int, causal: bool) -> float:
    """Maximum flow from (L, start) to (0, end); `capacities` [layer, query, key] are integers in steps of 1/`UNIT`."""
    if causal:
        if end > start:
            return 0.0
        # in a causal model every path stays between the two positions
        capacities = capacities[:, end : start + 1, end : start + 1]
        start, end = start - end, 0
    depth, tokens, _ = capacities.shape
    layer, query, key = np.nonzero(capacities)
    edges = coo_array(
        (capacities[layer, query, key], ((layer + 1) * tokens + query, layer * tokens + key)),
        shape=((depth + 1) * tokens,) * 2,
    )
    return maximum_flow(csr_array(edges), depth * tokens + start, end, method="dinic").flow_value / UNIT
