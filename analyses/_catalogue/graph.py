"""`Graph`: the directed graph that an analysis returns, and how it shows."""

from __future__ import annotations

from typing import Any

import networkx as nx

from headwater.kernels.notebook import listing, table

SHOWN = 10  # edges in a notebook


class Graph(nx.DiGraph):
    """A `networkx.DiGraph`; only its printed form is its own."""

    def __repr__(self) -> str:
        return f"Graph({self.number_of_nodes()} nodes, {self.number_of_edges()} edges)"

    def _repr_html_(self) -> str:
        told = self.graph
        facts = {name.replace("_", " "): told.get(name) for name in ("question", "unit", "model", "not_for")}
        by, edges = strongest(self)
        rows = [(u, v, float(about[by])) for u, v, about in edges[:SHOWN]]
        if len(edges) > SHOWN:
            facts["shown"] = f"the {SHOWN} largest of {len(edges)} edges"
        return table(repr(self), facts) + (listing(("from", "to", by), rows) if rows else "")


def strongest(graph: nx.DiGraph) -> tuple[str, list[tuple[Any, Any, dict[str, Any]]]]:
    """ "score", or "weight" where no edge has a score, and the edges that have one, by its size, the largest first."""
    edges = list(graph.edges(data=True))
    by = next((name for name in ("score", "weight") if any(name in about for _, _, about in edges)), "score")
    scored = [edge for edge in edges if edge[2].get(by) is not None]
    return by, sorted(scored, key=lambda edge: -abs(edge[2][by]))
