"""How much circuits share: heads, nodes and edges in common, compared with circuits drawn at random.

Merullo, Eickhoff & Pavlick (ICLR 2024) counted heads: 25 of 32 for indirect and coloured objects in GPT-2 Medium, and
17 to 25 % with circuits of other tasks (from the text, not from code). The analysis reads graphs and runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

import networkx as nx
import numpy as np
import xarray as xr
from scipy.optimize import linear_sum_assignment
from scipy.stats import hypergeom

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds, Seed, checked
from headwater.analyses._measures.stability import chance
from headwater.analyses.circuits._graph_files import circuit_of
from headwater.analyses.circuits._graphs import edges_of, select_circuit
from headwater.lens.errors import AnalysisError

WHAT = ("heads", "nodes", "edges")


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
        coords={"what": list(WHAT)},
        attrs={"model": " and ".join(models), "against_whole": whole is not None},
    )


@checked
def circuit_stability(
    graphs: Sequence[nx.DiGraph | str | Path],
    n: Annotated[int, Bounds(1)],
    selection: Literal["top", "greedy"] = "top",
    *,
    matched: bool = True,
    draws: Annotated[int, Bounds(1)] = 5,
    seed: Seed = 0,
) -> xr.Dataset:
    """How much the circuits of `n` edges share that are found on models of one shape, as those of several seeds.

    `share` [what, circuit]: of each circuit the mean `|a ∩ b| / |a ∪ b|` with the others, of heads, nodes and edges;
    `mean` [what] over circuits. `chance` is the mean share of edges where each circuit is as many edges of its graph as
    it holds, drawn at random `draws` times; they need not be connected. Each graph has scores on every edge of its
    model, as `edge_attribution` gives them, or is the file of one. For draws of pairs on one model see the attribute
    `stability` of a circuit (`select_circuit`).

    Heads of a layer have no order that two trainings have in common. With `matched` the heads of each layer of b are
    therefore numbered so that as many edges as possible are common with a: the best numbering of one layer at a time,
    until none is better, which may stay below the best of all. It raises shares by chance too, and `chance` is matched
    alike. Without it heads count by their numbers, as for checkpoints of one training. Under grouped queries the
    numbering does not keep the groups; graphs with `key_values="kv"` can not be matched.
    Not for: whether what is common does anything (`circuit_curve`); shares of circuits of different `n` side by side.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> pairs = hw.prompt_set("indirect_object", 4)
    >>> graphs = [hw.analyses.edge_attribution(model, some, steps=1) for some in (pairs[:2], pairs[2:])]
    >>> found = hw.analyses.circuit_stability(graphs, 50, matched=False)
    >>> bool(found["mean"].sel(what="edges") > found.chance)
    True
    """
    wholes = [circuit_of(given) for given in graphs]
    if len(wholes) < 2:
        raise AnalysisError("one graph has nothing to share with; give the graphs of two or more models")
    edges = [set(edges_of(whole)) for whole in wholes]
    if any(one != edges[0] for one in edges):
        raise AnalysisError("the graphs have other edges than each other; give those of models of one shape")
    if matched and any(".kv" in receiver for _, receiver in edges[0]):
        raise AnalysisError(
            'heads that share keys can not be numbered anew; give matched=False, or key_values="head"'
        )
    circuits = [select_circuit(whole, n, selection) for whole in wholes]
    found = _shared(circuits, matched)
    rng, by_chance = np.random.default_rng(seed), []
    known = edges_of(wholes[0])
    for _ in range(draws):
        picks = [rng.choice(len(known), len(edges_of(circuit)), replace=False) for circuit in circuits]
        drawn = [_of_edges(wholes[0], [known[k] for k in pick]) for pick in picks]
        by_chance.append(_shared(drawn, matched)[WHAT.index("edges")].mean())
    return xr.Dataset(
        {
            "share": (("what", "circuit"), found, {"unit": "share of what is in either"}),
            "mean": ("what", found.mean(1)),
            "chance": ((), float(np.mean(by_chance))),
        },
        coords={"what": list(WHAT), "circuit": np.arange(len(wholes))},
        attrs={
            "models": [str(whole.graph.get("model", "")) for whole in wholes],
            "n": n, "selection": selection, "matched": int(matched), "draws": draws, "seed": seed,
        },
    )  # fmt: skip


def _of_edges(whole: nx.DiGraph, kept: Sequence[tuple[str, str]]) -> nx.DiGraph:
    """The nodes that some edges join, with these edges."""
    inside = [(u, v) for u, v, kind in whole.edges(data="kind") if kind == "inside"]
    heard = {v for _, v in kept}
    return whole.edge_subgraph([*kept, *((u, v) for u, v in inside if u in heard)]).copy()


def _shared(circuits: Sequence[nx.DiGraph], matched: bool) -> np.ndarray:
    """Of each circuit the mean share with the others, [what, circuit]."""
    shares = np.zeros((len(WHAT), len(circuits), len(circuits)))
    for i, j in combinations(range(len(circuits)), 2):
        a, b = circuits[i], circuits[j]
        b = nx.relabel_nodes(b, _numbering(a, b)) if matched else b
        for what, members in enumerate((_head_names, _nodes, lambda graph: set(edges_of(graph)))):
            one, other = members(a), members(b)
            shares[what, i, j] = shares[what, j, i] = len(one & other) / max(1, len(one | other))
    return shares.sum(2) / (len(circuits) - 1)


def _numbering(a: nx.DiGraph, b: nx.DiGraph) -> dict[str, str]:
    """New names for the heads of b and their inputs under which it has the most edges in common with a."""
    heads = sorted({tuple(map(int, name.split(".")[:2])) for name in (*_head_names(a), *_head_names(b))})
    layers = sorted({layer for layer, _ in heads})
    size = 1 + max((head for _, head in heads), default=0)
    number = {layer: np.arange(size) for layer in layers}  # old number → new

    def named(name: str) -> str:
        layer, _, rest = name.partition(".")
        head, *tail = rest.split(".")
        return ".".join([layer, str(number[int(layer)][int(head)]), *tail]) if layer.isdecimal() else name

    edges = set(edges_of(a))
    common = -1
    while common < (now := sum((named(u), named(v)) in edges for u, v in edges_of(b))):
        common = now
        for layer in layers:
            gain = np.zeros((size, size))  # edges in common when old number i becomes j
            for u, v in edges_of(b):
                for end, other in ((u, v), (v, u)):
                    place, _, rest = end.partition(".")
                    if place != str(layer):
                        continue
                    head, *tail = rest.split(".")
                    for j in range(size):
                        name = ".".join([place, str(j), *tail])
                        gain[int(head), j] += (
                            (name, named(other)) if end == u else (named(other), name)
                        ) in edges
            number[layer] = linear_sum_assignment(-gain)[1]
    return {name: named(name) for name in b}


def _head_names(graph: nx.DiGraph) -> set[str]:
    return {name for name, kind in graph.nodes(data="kind") if kind == "head"}


def _heads(graph: nx.DiGraph) -> set[tuple[int, int]]:
    return {(n["layer"], n["head"]) for _, n in graph.nodes(data=True) if n.get("kind") == "head"}


def _nodes(graph: nx.DiGraph) -> set[str]:
    return {name for name, kind in graph.nodes(data="kind") if kind != "input"}


def _chance(whole: int, a: int, b: int, both: int) -> tuple[float, float]:
    """The expected share of two sets of these sizes, and the probability of `both` or more in common."""
    if a + b == 0:
        return np.nan, np.nan
    return chance(whole, a, b), float(hypergeom.sf(both - 1, whole, a, b))
