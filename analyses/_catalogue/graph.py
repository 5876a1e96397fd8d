"""`Graph`: the directed graph that an analysis returns, and how it shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
        facts["stability"] = stability(told)
        by, edges = strongest(self)
        rows = [(u, v, float(about[by])) for u, v, about in edges[:SHOWN]]
        if len(edges) > SHOWN:
            facts["shown"] = f"the {SHOWN} largest of {len(edges)} edges"
        return table(repr(self), facts) + (listing(("from", "to", by), rows) if rows else "")


def stability(told: Mapping[str, Any]) -> str | None:
    """How much of a circuit, or of the best edges of a graph, is found again, from its attributes; None: not said."""
    found, by_chance, over = (told.get(f"stability{more}") for more in ("", "_by_chance", "_over"))
    if not found and found != 0:
        return None if not over else over if str(over).startswith("unknown") else f"over {over}"
    if isinstance(found, str) and not found.startswith("{"):
        return found
    try:
        shares, random = (
            {"": float(each)} if isinstance(each, float | int) else json.loads(each) if each else {}
            for each in (found, by_chance)
        )
        words = [
            f"best {float(part):.0%}: {share:.2f}" if part else f"{share:.2f} found again"
            for part, share in shares.items()
        ]
        beside = [f" (by chance {random[part]:.2f})" if part in random else "" for part in shares]
    except (ValueError, TypeError, AttributeError):  # files may come from anyone
        return None
    return ", ".join(map("".join, zip(words, beside, strict=True))) + (f", over {over}" if over else "")


def strongest(graph: nx.DiGraph) -> tuple[str, list[tuple[Any, Any, dict[str, Any]]]]:
    """ "score", or "weight" where no edge has a score, and the edges that have one, by its size, the largest first."""
    edges = list(graph.edges(data=True))
    by = next((name for name in ("score", "weight") if any(name in about for _, _, about in edges)), "score")
    scored = [edge for edge in edges if edge[2].get(by) is not None]
    return by, sorted(scored, key=lambda edge: -abs(edge[2][by]))
