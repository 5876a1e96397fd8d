"""Signal tracing: which earlier heads made a head attend where it attends, and which heads made those, as a graph.

Sparse attention decomposition (Franco & Crovella 2024, arXiv 2410.00340): a score is a sum over the orthogonal slices
of its bilinear form. A head that fires uses few of them, and heads whose outputs lie in those slices sent the signal.
Norms keep the scale of the run. Two passes and no counterfactual prompt; `signal_interventions` tests the result.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import networkx as nx
import numpy as np

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.graph import Graph
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.bootstrap import redraws
from headwater.analyses._measures.stability import told_of, unknown
from headwater.analyses._prompts.examples import Examples, first_tokens, singles_of
from headwater.analyses._prompts.positions import place_of
from headwater.analyses._streams.redraws import DRAWS
from headwater.analyses._streams.score_slices import Forms
from headwater.analyses.circuits._signal_tracing import (
    Names,
    Rules,
    Seen,
    Source,
    Upstream,
    Walk,
    heads_of,
    possible,
    sources_of,
    statistics,
    trace,
)
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import HeadNames
from headwater.lens.progress import progress


@analysis
def trace_signals(
    model: HookedModel,
    examples: Examples,
    roots: Annotated[HeadNames | None, 'heads, as "9.6 9.9"; none: all that fire'] = None,
    position: Annotated[int, "query position from which roots look"] = -1,
    source: Source = None,
    firing: Annotated[float, "least weight of a pair on which a head fires", Bounds(0.0, 1.0)] = 0.5,
    slices: Annotated[float, "share of the score that the slices used must exceed", Bounds(0.0, 1.0)] = 1.0,
    share: Annotated[
        float, "share of all contributions that the traced heads must exceed", Bounds(0.0, 1.0)
    ] = 0.7,
    constant: Annotated[bool, "count the 1 beside each output, an offset equal for all heads"] = False,
    upstream: Annotated[Upstream, "trace heads alone, or the embedding and MLPs too"] = "heads",
    relative: Annotated[bool, "trace why this key rather than the mean of all, by weight"] = False,
    control: Annotated[Examples | None, "ordinary texts on which firings are counted too"] = None,
    names: Names | None = None,
) -> nx.DiGraph:
    """Trace the roots that fire from `position` (on `source`) back to heads that do not fire.

    A head fires on (i, j), j not the first token, where `A_ij ≥ firing` and its score is ≥ 0. Of the terms `σ_k
    (x̃_i·u_k)(v_k·x̃_j)` of its score, the fewest largest are used whose sum exceeds `slices` times the score (all
    positive ones where none does). The output y of an earlier head contributes `Σ_k g_k √σ_k (u_k·ỹ)/scale_i` to the
    query side at i, with g_k the sign of x̃_i·u_k, and `Σ_k g_k √σ_k (v_k·ỹ)/scale_j` to the key side at j. On each
    side the fewest largest contributions become edges whose sum exceeds `share` of all; a side to which earlier heads
    contribute less than 1e-4 has none. A sender that fires at its position is traced in turn.

    `relative` replaces x̃_j by x̃_j minus the mean of all keys, weighted by A_im, both in the score and in the
    contributions to the key side; the firing pairs stay the same.

    Graph: nodes "8.6@12" (the head's output at position 12) and its inputs "8.6.q@12" and "8.6.k@4" on the pairs it
    fires on; `count` is the number of prompts, `pairs` the number of traced pairs on which a head fires. Edges into
    inputs carry `weight`, the mean contribution over the `count` prompts that have it, and `input` "q" or "k". `total`
    of an input is the mean of all upstream contributions, traced or not. Edges of kind "inside" join a head's inputs to
    it. `names(prompt, position)` names positions, so that prompts of different lengths add up.

    Attributes: `head_nodes`, `edges` and `edges_from_heads` count the graph; `firings` (JSON) the pairs on which each
    head fires in all prompts, up to the query position, traced or not; `control_firings` those in `control`, texts cut
    to the longest prompt's length, from all positions. Published settings: the defaults with `constant=True`.
    `stability` is the mean share of the graph's edges that are found when the prompts are redrawn with replacement (100
    times), `stability_by_chance` that of random sets of these sizes among the edges that heads at these positions could
    have; both are of edges alone, whatever their weight.

    Rotary models are decomposed per pair of positions; norms on queries and keys are refused. A position bias (ALiBi)
    is not part of the score.

    Question: Which earlier heads made a head look where it looks?
    Unit: coordinates in the slices used, each times the root of its strength; mean over prompts.
    Source: Franco & Crovella 2024, arXiv:2410.00340; compared with the authors' code, except `constant` off,
    upstream="all" and the key side of `relative`, which are ours. The authors ran weights whose value biases
    TransformerLens had folded into the output bias; here they stay in the heads' outputs, so graphs differ.
    Cost: two passes per prompt; one decomposition of size d_head per head, per firing where a model rotates.
    Not for: weights of different readers side by side; causal claims without an intervention; heads that look evenly.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> graph = hw.analyses.trace_signals(model, text, roots="3.1")
    >>> sorted(graph.predecessors("3.1@14"))
    ['3.1.k@14', '3.1.q@14']
    """
    rules = Rules(firing, slices, share, constant, upstream, relative)
    heads = heads_of(model, roots)
    prompts = singles_of(model, examples)
    sources = sources_of(source, len(prompts))
    forms = Forms(model, prompts)
    found: list[Seen] = []
    counts: Counter[str] = Counter()
    whole = 0
    for place, ids in enumerate(progress(prompts, desc="tracing", unit="prompt")):
        prompt = forms.run(ids)
        begin = place_of(position, prompt.length, f"prompt {place}")
        key = sources[place]
        end = None if key is None else place_of(key, prompt.length, f"prompt {place}", "source")
        walk = Walk(forms, prompt, rules, place, names or _number)
        found.append(trace(walk, heads, begin, end))
        counts.update(walk.firings(begin))
        whole = possible(model, walk, found)
    told: dict[str, Any] = {"firings": _fired(counts), **_stability(found, whole)}
    if control is not None:
        longest = max(row.shape[1] for row in prompts)
        texts = [first_tokens([row], longest) for row in singles_of(model, control)]
        others: Counter[str] = Counter()
        for ids in progress(texts, desc="control texts", unit="text"):
            walk = Walk(forms, forms.run(ids), rules, 0, _number)
            others.update(walk.firings(walk.prompt.length - 1))
        told |= {"control_firings": _fired(others), "control_texts": len(texts)}
    graph = _graph(found)
    told |= {"roots": [str(h) for h in heads], "prompts": len(prompts)}
    graph.graph.update({**told, **statistics(graph)})
    return graph


def _stability(found: list[Seen], whole: int) -> dict[str, Any]:
    """How much of the trace is in the traces of redrawn prompts, whose edges are some of its own."""
    if len(found) == 1:
        return unknown("one prompt, so there is nothing to redraw")
    edges = [set(seen.edges) for seen in found]
    others = [set().union(*(edges[place] for place in pick)) for pick in redraws(len(found), DRAWS, 0)]
    return told_of(set().union(*edges), others, whole, f"{DRAWS} redraws of {len(found)} prompts")


def _fired(counts: Counter[str]) -> dict[str, int]:
    """The heads that fire, most often first."""
    return {head: count for head, count in counts.most_common() if count}


def _number(prompt: int, position: int) -> str:
    return str(position)


def _graph(found: list[Seen]) -> nx.DiGraph:
    graph = Graph()
    weights: dict[tuple[str, str], list[float]] = {}
    totals: dict[str, list[float]] = {}
    for seen in found:
        for name, about in seen.nodes.items():
            if name not in graph:
                graph.add_node(name, **about, count=0)
            graph.nodes[name]["count"] += 1
        for name, pairs in seen.pairs.items():
            graph.nodes[name]["pairs"] = graph.nodes[name].get("pairs", 0) + pairs
        for edge in seen.inside:
            graph.add_edge(*edge, kind="inside")
        for edge, given in seen.edges.items():
            weights.setdefault(edge, []).append(float(np.mean(given)))
        for name, given in seen.totals.items():
            totals.setdefault(name, []).append(float(np.mean(given)))
    for name, each in totals.items():
        graph.nodes[name]["total"] = float(np.mean(each))
    for (sender, reader), each in weights.items():
        about = {"input": reader.split("@")[0][-1], "weight": float(np.mean(each)), "count": len(each)}
        graph.add_edge(sender, reader, kind="edge", **about)
    return graph
