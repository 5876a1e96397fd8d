"""How much two circuits share: heads, nodes and edges in common, compared with circuits drawn at random.

Merullo, Eickhoff & Pavlick (ICLR 2024) counted heads: 25 of 32 for indirect and coloured objects in GPT-2 Medium, and
17 to 25 % with circuits of other tasks (from the text, not from code). The analysis reads graphs and runs no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import networkx as nx
import numpy as np
import xarray as xr
from scipy.stats import hypergeom

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses.circuits._graph_files import circuit_of
from headwater.analyses.circuits._graphs import edges_of
from headwater.lens.errors import AnalysisError


@analysis
def circuit_overlap(
    graph_a: nx.DiGraph | str | Path,
    graph_b: nx.DiGraph | str | Path,
    whole: Annotated[
        nx.DiGraph | str | Path | None, "file of all that there is, for chance; none: no chance"
    ] = None,
) -> xr.Dataset:
    """What two circuits have in common: each variable is over `what`, "heads", "nodes" and "edges".

    `both`, `only_a` and `only_b` are counts. `share` is `|a ∩ b| / |a ∪ b|`, NaN for two empty circuits. `whole` is the
    graph of the entire model, from which random circuits of the same sizes are drawn. With it, `chance` is the expected
    share of two such circuits and `p` the probability of as much in common or more, both exact (hypergeometric);
    without it both are NaN. Random circuits need not be connected, which makes `chance` smaller than for connected
    ones. Heads are compared by layer and number; edges inside heads do not count. Each graph may be a file of
    `write_circuit`. AnalysisError where a circuit holds something that `whole` lacks.

    Question: How much do two circuits share?
    Unit: share of what is in either; counts are counts.
    Source: Merullo, Eickhoff & Pavlick 2024, arXiv:2310.08744 (its text); `chance` and `p` are ours.
    Cost: none to speak of: no model is run.
    Not for: shares of circuits of different sizes side by side (see chance); whether the shared part does anything.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> clean = "When Mary and John went to the store , John gave a drink to"
    >>> corrupt = "When Mary and John went to the store , Mary gave a drink to"
    >>> whole = hw.analyses.edge_attribution(model, [(clean, corrupt)], answer="Mary", wrong="John", steps=1)
    >>> small, large = (hw.analyses.select_circuit(whole, n) for n in (50, 100))
    >>> found = hw.analyses.circuit_overlap(small, large, whole)
    >>> found.only_a.values.tolist(), bool((found.share > found.chance).all())
    ([0, 0, 0], True)
    """
    graph_a, graph_b = (circuit_of(given) for given in (graph_a, graph_b))
    whole = None if whole is None else circuit_of(whole)
    rows = []
    for what, members in (("heads", _heads), ("nodes", _nodes), ("edges", edges_of)):
        a, b = set(members(graph_a)), set(members(graph_b))
        row: dict[str, float] = {"both": len(a & b), "only_a": len(a - b), "only_b": len(b - a)}
        row["share"] = len(a & b) / len(a | b) if a | b else np.nan
        row["chance"], row["p"] = np.nan, np.nan
        if whole is not None:
            known = set(members(whole))
            if missing := sorted(map(str, (a | b) - known)):
                raise AnalysisError(
                    f"whole lacks {len(missing)} of the circuits' {what}, as {missing[0]}; take the same model's"
                )
            row["chance"], row["p"] = _chance(len(known), len(a), len(b), len(a & b))
        rows.append(row)
    models = list(dict.fromkeys(str(graph.graph.get("model", "")) for graph in (graph_a, graph_b)))
    return xr.Dataset(
        {name: ("what", [row[name] for row in rows]) for name in rows[0]},
        coords={"what": ["heads", "nodes", "edges"]},
        attrs={"model": " and ".join(models), "against_whole": whole is not None},
    )


def _heads(graph: nx.DiGraph) -> set[tuple[int, int]]:
    return {(n["layer"], n["head"]) for _, n in graph.nodes(data=True) if n.get("kind") == "head"}


def _nodes(graph: nx.DiGraph) -> set[str]:
    return {name for name, kind in graph.nodes(data="kind") if kind != "input"}


def _chance(whole: int, a: int, b: int, both: int) -> tuple[float, float]:
    """The expected share of two sets of these sizes, and the probability of `both` or more in common."""
    if a + b == 0:
        return np.nan, np.nan
    common = np.arange(min(a, b) + 1)
    each = hypergeom.pmf(common, whole, a, b)
    return float((each * common / (a + b - common)).sum()), float(hypergeom.sf(both - 1, whole, a, b))
