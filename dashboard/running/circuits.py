"""Circuits: graphs of heads that work together, how much of the measure they carry, and what an edge is worth.

Every score and every check is of the page's measure, by the edits in force of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import xarray as xr
from torch import Tensor

import headwater as hw
from headwater.analyses._measures.stability import told_of
from headwater.analyses.circuits._graphs import edges_of as edges_of
from headwater.dashboard.running import runs
from headwater.dashboard.running.measure import KINDS, Measure
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state.state import State
from headwater.lens.errors import AnalysisError
from headwater.lens.naming.heads import HeadNames

METHODS = {
    "edges": "edges by their effect",
    "trace": "signals traced back",
    "routes": "what is read from where",
}
ANALYSIS = {"edges": "edge_attribution", "trace": "trace_signals", "routes": "information_flow_routes"}
SIZES = (10, 20, 40, 60, 100, 150, 200, 300, 400, 600, 1000, 2000, 5000)
MOST_LISTED = 5000  # edges in a table
ENDS = ["sender node", "reader node"]
COLUMNS = ["sender", "reader", "input", "weight", *ENDS]


@dataclass(frozen=True)
class Circuit:
    """The strongest edges as a table with COLUMNS, the graph that they come from, and how many edges that has.

    A sender and a reader are names such as "1.3", "1.3@14", "mlp.2", "embed" or "logits"; the nodes are the names in
    the graph, in which a reader has one node per input.
    """

    graph: nx.DiGraph
    edges: pd.DataFrame
    count: int

    @property
    def name(self) -> str:
        """What the number of an edge is called in the graph."""
        return "weight" if "firings" in self.graph.graph else "score"

    def best(self, count: int, without: Collection[str] = ()) -> pd.DataFrame:
        """The strongest edges, of which none touches the nodes left out."""
        left_out = list(without)
        gone = self.edges["sender"].isin(left_out) | self.edges["reader"].isin(left_out)
        return pd.DataFrame(self.edges[~gone]).head(count).reset_index(drop=True)


def value_of_pairs(chosen: Measure, run: Run) -> Callable[[Tensor], Tensor]:
    """The measure as analyses of pairs take one, of outputs [pair, …]. AnalysisError for the loss of a text."""
    loss = chosen.of_run(run).loss
    if loss is None:
        raise AnalysisError(
            f"circuits explain an answer, and the measure is {KINDS[chosen.kind]}; choose another at the top"
        )

    def measure(outputs: Tensor) -> Tensor:
        return -loss(outputs, outputs)

    return measure


def of_edges(state: State, run: Run, chosen: Measure, corrupt: Any, steps: int) -> Circuit:
    """Each edge by how far the measure falls when it carries what the corrupt prompt puts there."""
    model, value = runs.model_of(state, run), value_of_pairs(chosen, run)
    with runs.editing(run):
        graph = hw.analyses.edge_attribution(
            model, [(run.example, corrupt)], measure=value, steps=steps, draws=1
        )
    return circuit_of(graph)


def of_trace(state: State, run: Run, position: int, roots: HeadNames | None, source: int | None) -> Circuit:
    """The signals that made heads look where they look, from a query position backwards."""
    model = runs.model_of(state, run)
    with runs.editing(run):
        return circuit_of(
            hw.analyses.trace_signals(model, run.example, roots=roots, position=position, source=source)
        )


def of_routes(state: State, run: Run, position: int) -> Circuit:
    """The share of what each part reads that comes from each part before it, at one position."""
    model = runs.model_of(state, run)
    with runs.editing(run):
        return circuit_of(hw.analyses.information_flow_routes(model, run.example, queries=[position]))


def circuit_of(graph: nx.DiGraph) -> Circuit:
    """The table of a graph: an edge into an input of a head is one to the head."""
    name = "weight" if "firings" in graph.graph else "score"
    known = [(about[name], u, v, about) for u, v, about in graph.edges(data=True) if name in about]
    order = np.argsort(-np.abs([each[0] for each in known]), kind="stable")[:MOST_LISTED] if known else []
    lines = []
    for place in order:
        value, sender, node, about = known[place]
        readers = list(graph.successors(node)) if graph.nodes[node].get("kind") == "input" else [node]
        lines += [(sender, reader, about.get("input", ""), float(value), sender, node) for reader in readers]
    return Circuit(graph, pd.DataFrame(lines, columns=COLUMNS), len(known))


def grouped(edges: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The edges between groups of nodes, their weights added up; those inside of a group are left out."""
    of = {node: name for name, nodes in groups.items() for node in nodes}
    if not of:
        return edges
    frame = edges.assign(sender=edges["sender"].replace(of), reader=edges["reader"].replace(of))
    frame = pd.DataFrame(frame[frame["sender"] != frame["reader"]])
    inside = frame["sender"].isin(groups) | frame["reader"].isin(groups)
    sums: dict[tuple[str, str], float] = {}
    joined = pd.DataFrame(frame[inside])
    for sender, reader, weight in zip(joined["sender"], joined["reader"], joined["weight"], strict=True):
        sums[sender, reader] = sums.get((sender, reader), 0.0) + weight
    added = pd.DataFrame([(*ends, "", sum_, "", "") for ends, sum_ in sums.items()], columns=COLUMNS)
    return pd.concat([pd.DataFrame(frame[~inside]), added], ignore_index=True)


def sizes_of(count: int) -> list[int]:
    """Numbers of edges at which a circuit is tried."""
    return [size for size in SIZES if size < count] + [count]


def faithfulness(
    state: State, run: Run, chosen: Measure, corrupt: Any, circuit: Circuit, sizes: Sequence[int], how: str
) -> xr.Dataset:
    """How much of the measure's difference the best edges carry, by their number."""
    model, value = runs.model_of(state, run), value_of_pairs(chosen, run)
    with runs.editing(run):
        return hw.analyses.circuit_faithfulness(
            model, circuit.graph, [(run.example, corrupt)], measure=value, sizes=list(sizes), selection=how, draws=1
        )  # fmt: skip


def curve(
    state: State, run: Run, chosen: Measure, corrupt: Any, circuit: Circuit, how: str
) -> xr.Dataset:  # fmt: skip
    """How much of the measure's difference the best edges regain at the sizes of the benchmark, and its areas."""
    model, value = runs.model_of(state, run), value_of_pairs(chosen, run)
    with runs.editing(run):
        return hw.analyses.circuit_curve(
            model, circuit.graph, [(run.example, corrupt)], measure=value, selection=how, draws=1
        )


def kept(circuit: Circuit, size: int, how: str, without: Collection[str] = ()) -> nx.DiGraph:
    """The circuit of the best edges, without the nodes left out and what has no way to the answer any more."""
    graph = circuit.graph.copy()
    graph.remove_nodes_from(without)
    return hw.analyses.select_circuit(graph, size, how)


def carries(state: State, run: Run, chosen: Measure, corrupt: Any, graph: nx.DiGraph) -> dict[str, float]:
    """The measure of a circuit, of the whole model and of nothing, by actual runs."""
    model, value = runs.model_of(state, run), value_of_pairs(chosen, run)
    with runs.editing(run):
        found = hw.analyses.circuit_faithfulness(
            model, graph, [(run.example, corrupt)], measure=value, draws=1
        )
    return {
        "circuit": float(found["measure"].sel(kept="circuit").values.ravel()[0]),
        "whole": float(found["whole"].values[0]), "nothing": float(found["nothing"].values[0]),
        "faithfulness": float(found["mean"].sel(score="faithfulness").values[0]),
    }  # fmt: skip


def without_edge(
    state: State, run: Run, chosen: Measure, corrupt: Any, sender: str, reader: str
) -> float | None:
    """The measure when one edge alone is cut and all else is recomputed; None for an edge the wiring does not have.

    The edge carries what the corrupt prompt puts there; where there is none, nothing.
    """
    from headwater.analyses._streams.component_graph import Wiring
    from headwater.analyses.circuits._graphs import graph_of

    model, value = runs.model_of(state, run), value_of_pairs(chosen, run)
    with runs.editing(run):
        wiring = Wiring(model, "head")
        graph = graph_of(wiring, wiring.edges().double(), {})
        if not graph.has_edge(sender, reader):
            return None
        graph.remove_edge(sender, reader)
        found = hw.analyses.circuit_faithfulness(
            model, graph, [(run.example, run.example if corrupt is None else corrupt)], measure=value,
            ablation="zero" if corrupt is None else "resample", draws=1,
        )  # fmt: skip
    return float(found["measure"].sel(kept="circuit").values.ravel()[0])


def without_head(state: State, run: Run, chosen: Measure, head: str) -> float | None:
    """The measure when a head writes nothing, by a run."""
    edits = [
        *(state.edits if run.edits != "[]" else []),
        state.on_part({"edit": "AblateHeads", "heads": [head]}),
    ]
    other = State(**{**vars(state), "edits": edits, "notices": []})
    if run.edits == "[]":
        other.b_text = other.b_model = None
    changed = runs.b(other)
    return None if changed is None else chosen.value(changed)


def overlap(one: Circuit, other: Circuit, graphs: tuple[nx.DiGraph, nx.DiGraph]) -> xr.Dataset:
    """What two circuits of one model have in common, against chance where both come from the same whole."""
    whole = one.graph if set(one.graph) == set(other.graph) else None
    return hw.analyses.circuit_overlap(*graphs, whole)


def again(circuit: Circuit, others: Sequence[Circuit], size: int) -> dict[str, Any]:
    """The mean share of the best edges with those of other circuits of the model, and chance."""
    best = [set(zip(*(each.edges[n][:size] for n in ENDS), strict=True)) for each in (circuit, *others)]
    over = f"{len(others)} other corrupt prompt{'s' * (len(others) > 1)}"
    return told_of(best[0], best[1:], circuit.count, over)


def head_of(node: str) -> tuple[int, int] | None:
    """The layer and head of a node such as "1.3@14"; None for others."""
    layer, dot, head = node.partition("@")[0].partition(".")
    return (int(layer), int(head)) if dot and layer.isdigit() and head.isdigit() else None


def position_of(node: str) -> int | None:
    place = node.partition("@")[2]
    return int(place) if place.isdigit() else None
