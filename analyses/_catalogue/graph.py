"""`Graph`: the directed graph that an analysis returns, which prints in one line."""

from __future__ import annotations

import networkx as nx


class Graph(nx.DiGraph):
    """A `networkx.DiGraph`; only its printed form is its own."""

    def __repr__(self) -> str:
        return f"Graph({self.number_of_nodes()} nodes, {self.number_of_edges()} edges)"
