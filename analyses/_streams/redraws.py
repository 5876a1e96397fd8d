"""How much of a circuit is found again when the pairs or texts that it comes from are redrawn.

An edge (or node) keeps its score on every pair or text in the attribute `by_example`, so that redraws take no run of
the model.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import networkx as nx
import numpy as np

from headwater.analyses._measures.bootstrap import redraws
from headwater.analyses._measures.stability import EMPTY, chance, unknown
from headwater.analyses._streams.component_graph import EMBED, LOGITS
from headwater.analyses._streams.ranked_edges import greedily, scores_of
from headwater.lens.errors import AnalysisError

BY_EXAMPLE = "by_example"
MOST = 2**24  # scores that are kept, edges times examples
DRAWS = 100
LARGE, FEW = 20_000, 10  # edges from which a greedy choice is redrawn less often, and how often
PARTS = (0.01, 0.1)  # of all edges: circuits that every graph tells of


def keep_examples(abouts: Sequence[dict[str, Any]], scores: np.ndarray) -> None:
    """Write the scores [example, edge] to the attributes of each edge, as text of 32-bit floats."""
    if scores.size > MOST:
        return
    for about, row in zip(abouts, np.ascontiguousarray(scores.T, dtype="<f4"), strict=True):
        about[BY_EXAMPLE] = base64.b64encode(row.tobytes()).decode()


def without_examples(circuit: nx.DiGraph) -> nx.DiGraph:
    """A chosen circuit, in place: what was left out could be chosen in another draw, so the rest can not be redrawn."""
    for about in (*circuit.nodes.values(), *circuit.edges.values()):
        about.pop(BY_EXAMPLE, None)
    return circuit


def as_variables(circuits: Sequence[nx.DiGraph]) -> tuple[list[float], list[float], str]:
    """The stability of circuits, that by chance (NaN: not known), and over what or why not, for a result of several."""
    told = [circuit.graph for circuit in circuits]
    known = [each for each in told if isinstance(each.get("stability"), float)]
    again, by_chance = (
        [float(each[name]) if isinstance(each.get(name), float) else np.nan for each in told]
        for name in ("stability", "stability_by_chance")
    )
    if known:
        return again, by_chance, str(known[0].get("stability_over", ""))
    says = [str(each["stability"]) for each in told if str(each.get("stability")).startswith("unknown")]
    why = says[0] if says else "unknown: this is no circuit that was chosen here; ask for sizes"
    return again, by_chance, why


@dataclass(frozen=True, eq=False)
class Redraws:
    """The edges of a graph (or its nodes, where these alone have scores) with their scores on every example.

    `rows` is [example, edge] in the order of `names`, None where it is not known; `why` then says so.
    """

    graph: nx.DiGraph
    names: list[Any]
    scores: np.ndarray
    of_nodes: bool
    signed: bool
    rows: np.ndarray | None
    why: str

    @classmethod
    def of(cls, graph: nx.DiGraph, signed: bool = False) -> Redraws:
        """The redraws of a graph with scores. AnalysisError where its scores per example can not be read."""
        scores, of_nodes = scores_of(graph, signed)
        items: Any = graph.nodes if of_nodes else graph.edges
        kept = [items[name].get(BY_EXAMPLE) for name in scores]
        told = graph.graph
        what = "text" if "examples" in told else "pair"
        if told.get("examples", told.get("pairs")) == 1:
            why = f"one {what}, so there is nothing to redraw"
        elif isinstance(told.get("stability"), float):
            why = "this is a circuit already; choose from the graph with every edge"
        elif None in kept or not kept:
            why = f"the graph does not keep its scores on each {what}"
        else:
            rows = _rows(kept)
            if len(rows) > 1:
                return cls(graph, list(scores), np.array(list(scores.values())), of_nodes, signed, rows, "")
            why = f"one {what}, so there is nothing to redraw"
        return cls(graph, list(scores), np.array(list(scores.values())), of_nodes, signed, None, why)

    def told(self, n: int, selection: Literal["top", "greedy"] = "top") -> dict[str, Any]:
        """The attributes of the circuit of the `n` best edges."""
        ((share, by_chance),) = self.shares([n], selection)
        if np.isnan(share):
            return unknown(self.why or EMPTY)
        return {"stability": share, "stability_by_chance": by_chance, "stability_over": self.over(selection)}

    def told_of_parts(self) -> dict[str, Any]:
        """The attributes of the graph itself: of circuits of the best 1 % and 10 %, before pruning, as JSON by part."""
        if self.rows is None:
            return unknown(self.why)
        sizes = [max(1, int(part * len(self.names))) for part in PARTS]
        both = zip(*self.shares(sizes, prune=False), strict=True)
        told = [json.dumps(dict(zip(map(str, PARTS), values, strict=True))) for values in both]
        return {"stability": told[0], "stability_by_chance": told[1], "stability_over": self.over("top")}

    def over(self, selection: str) -> str:
        """Over what the stability is a mean, or why it is not known."""
        if self.rows is None:
            return f"unknown: {self.why}"
        what = "texts" if "examples" in self.graph.graph else "pairs"
        return f"{self._draws(selection)} redraws of {len(self.rows)} {what}"

    def shares(
        self, sizes: Sequence[int], selection: Literal["top", "greedy"] = "top", prune: bool = True
    ) -> list[tuple[float, float]]:
        """For each number of best edges the mean share with the circuits of redraws, and chance; NaN: not known."""
        nothing = (np.nan, np.nan)
        if self.rows is None:
            return [nothing] * len(sizes)
        wired = _Wired.of(self.graph, self.names) if prune and not self.of_nodes else None

        def circuits(values: np.ndarray) -> list[np.ndarray]:
            order = self._order(values, selection, max(sizes))
            return [order[:n] if wired is None else wired.pruned(order[:n]) for n in sizes]

        own = circuits(self.scores)
        inside = [np.isin(np.arange(len(self.names)), each) for each in own]
        shares, others = np.zeros(len(sizes)), np.zeros(len(sizes))
        count = 0
        for values in self._drawn(selection):
            count += 1
            for place, each in enumerate(circuits(values)):
                common = int(inside[place][each].sum())
                union = len(own[place]) + len(each) - common
                shares[place] += common / max(1, union)
                others[place] += len(each)
        return [
            (float(share), chance(len(self.names), len(each), round(float(size)))) if len(each) else nothing
            for share, each, size in zip(shares / count, own, others / count, strict=True)
        ]

    def _draws(self, selection: str) -> int:
        return FEW if selection == "greedy" and len(self.names) > LARGE else DRAWS

    def _drawn(self, selection: str) -> Iterator[np.ndarray]:
        """The scores [edge] of each redraw, rounded, so that equal ones stay equal and in the order of the graph."""
        assert self.rows is not None
        count, seed = len(self.rows), self.graph.graph.get("seed")
        rows = self.rows.astype(np.float64)
        for pick in redraws(count, self._draws(selection), seed if isinstance(seed, int) else 0):
            mean = (np.bincount(pick, minlength=count) / count @ rows).astype(np.float32)
            yield mean if self.signed else np.abs(mean)

    def _order(self, values: np.ndarray, selection: str, most: int) -> np.ndarray:
        """The numbers of the best `most` edges, the best first."""
        if selection == "top" or self.of_nodes:
            return np.argsort(-values, kind="stable")[:most]
        number = {name: place for place, name in enumerate(self.names)}
        chosen = greedily(self.graph, dict(zip(self.names, values.tolist(), strict=True)), most)
        return np.array([number[edge] for edge in chosen], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class _Wired:
    """Which node sends an edge, which input it goes to, and which nodes read through an input, as numbers."""

    sender: np.ndarray
    reader: np.ndarray
    joins: np.ndarray  # [input and node that reads through it, 2]
    ends: np.ndarray  # the embedding and the logits

    @classmethod
    def of(cls, graph: nx.DiGraph, edges: Sequence[tuple[str, str]]) -> _Wired:
        number = {name: place for place, name in enumerate(graph)}
        inputs = {v for _, v in edges}
        owners = {
            v: list(graph.successors(v)) if graph.nodes[v].get("kind") == "input" else [v] for v in inputs
        }
        joins = [(number[v], number[owner]) for v, names in owners.items() for owner in names]
        ends = [number.get(name, -1) for name in (EMBED, LOGITS)]
        sender, reader = (np.array([number[edge[side]] for edge in edges], dtype=np.int64) for side in (0, 1))
        return cls(sender, reader, np.array(joins, dtype=np.int64).reshape(-1, 2), np.array(ends))

    def pruned(self, chosen: np.ndarray) -> np.ndarray:
        """Those of the edges that a path joins to the embedding and to the logits, as `_graphs.pruned` leaves them."""
        count = 1 + int(max(self.joins.max(initial=0), self.sender.max(initial=0), self.ends.max()))
        while True:
            heard, speaks = np.zeros((2, count + 1), dtype=bool)
            read = np.zeros(count + 1, dtype=bool)
            read[self.reader[chosen]] = True
            heard[self.joins[read[self.joins[:, 0]], 1]] = True
            speaks[self.sender[chosen]] = True
            heard[self.ends[0]] = speaks[self.ends[1]] = True
            leads = np.zeros(count + 1, dtype=bool)
            leads[self.joins[speaks[self.joins[:, 1]], 0]] = True
            left = chosen[heard[self.sender[chosen]] & leads[self.reader[chosen]]]
            if len(left) == len(chosen):
                return left
            chosen = left


def _rows(kept: Sequence[str]) -> np.ndarray:
    """Scores [example, edge] from the texts of edges. AnalysisError where they are damaged."""
    try:
        parts = [base64.b64decode(text, validate=True) for text in kept]
        if len({len(part) for part in parts}) > 1 or len(parts[0]) % 4:
            raise ValueError
        found = np.frombuffer(b"".join(parts), dtype="<f4").reshape(len(parts), -1).T
    except (ValueError, TypeError):
        found = np.full((1, 1), np.nan)
    if not np.isfinite(found).all():
        raise AnalysisError(
            f"the scores that edges keep of each example ({BY_EXAMPLE}) are damaged; write the graph's file again"
        )
    return found
