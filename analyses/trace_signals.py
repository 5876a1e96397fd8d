"""Signal tracing: which heads before it made a head look where it looks, and which heads made those look, as a graph.

Sparse attention decomposition (Franco & Crovella 2024, arXiv 2410.00340): a score is a sum over the orthogonal slices
of its bilinear form, a head that fires uses few of them, and heads whose outputs lie in those sent the signal. Norms
are frozen at the scale of the run. Two passes and no counterfactual prompt; what it finds is a reading of the weights,
to be tried with `signal_interventions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import networkx as nx
import numpy as np
from torch import Tensor
from tqdm import tqdm

from headwater.analyses._about import About
from headwater.analyses._examples import Examples, batches_of
from headwater.analyses._settings import Bounds
from headwater.analyses._slices import Forms, Prompt, leading, used
from headwater.lens.errors import AnalysisError, HeadError
from headwater.lens.heads import Head
from headwater.lens.model import HookedModel
from headwater.lens.record import provenance

ABOUT = About(
    question="Which earlier heads made a head look where it looks?",
    unit="coordinates in the slices used, each times the root of its strength; mean over prompts",
    paper="Franco & Crovella 2024, arXiv:2410.00340",
    inputs="model+examples",
    cost="two passes per prompt; one decomposition of size d_head per head, per firing where a model rotates",
    not_for="weights of different readers side by side; causal claims without an intervention; heads that look evenly",
)

LEAST = 1e-4  # of what a side reads in all: heads that together say less are rounding
Upstream = Literal["heads", "all"]
Names = Callable[[int, int], str]  # (number of the prompt, position) → the position's name
Source = Annotated[int | Sequence[int] | None, "key that roots look at, one or one per prompt; none: any"]


@dataclass(frozen=True)
class Rules:
    """How a trace is walked; the settings of `trace_signals` of the same names."""

    firing: float
    slices: float
    share: float
    constant: bool
    upstream: Upstream


@dataclass
class _Seen:
    """What one prompt showed: contributions by edge, and the nodes of the trace."""

    edges: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    inside: set[tuple[str, str]] = field(default_factory=set)


def trace_signals(
    model: HookedModel,
    examples: Examples,
    roots: Annotated[str | Sequence[str] | None, 'heads, as "9.6 9.9"; none: all that fire'] = None,
    position: Annotated[int, "query position from which roots look"] = -1,
    source: Source = None,
    firing: Annotated[float, "least weight of a pair on which a head fires", Bounds(0.0, 1.0)] = 0.5,
    slices: Annotated[float, "share of the score that the slices used must exceed", Bounds(0.0, 1.0)] = 1.0,
    share: Annotated[
        float, "share of all contributions that the traced heads must exceed", Bounds(0.0, 1.0)
    ] = 0.7,
    constant: Annotated[bool, "count the 1 beside each output, an offset equal for all heads"] = False,
    upstream: Annotated[Upstream, "trace heads alone, or the embedding and MLPs too"] = "heads",
    names: Names | None = None,
) -> nx.DiGraph:
    """Trace the roots that fire from `position` (on `source`) back to heads that do not fire.

    A head fires on (i, j), j not the first token, where `A_ij ≥ firing` and its score is ≥ 0. Of the terms
    `σ_k (x̃_i·u_k)(v_k·x̃_j)` of its score the largest are used whose sum exceeds `slices` of it (all positive ones
    where none does). An output y of an earlier head at i gives `Σ_k g_k √σ_k (u_k·ỹ)/scale_i` to the query's side, g_k
    the sign of x̃_i·u_k, and at j `Σ_k g_k √σ_k (v_k·ỹ)/scale_j` to the key's. Of each side the largest contributions
    are edges whose sum exceeds `share` of all; a side of which earlier heads make less than 1e-4 has none. A head that
    fires where it speaks is traced in turn.

    Graph: nodes "8.6@12" (the head as it writes at position 12), and its inputs "8.6.q@12" and "8.6.k@4" on the pairs
    it fires on; `count` is the number of prompts. Edges into inputs carry `weight`, the mean contribution over the
    `count` prompts that have it, and `input` "q" or "k"; edges of kind "inside" join a head's inputs to it.
    `names(prompt, position)` names positions, so that prompts of different lengths add up. Published settings: the
    defaults with `constant=True`. Rotary models are decomposed per pair of positions; norms on queries and keys are
    refused. A bias of positions (ALiBi) is no part of the score. Not here: the relative variant.
    Unit: that of ABOUT. Source: the authors' code, checked; that `constant` may be off, and "all", are ours.
    """
    rules = Rules(firing, slices, share, constant, upstream)
    if upstream not in ("heads", "all"):
        raise AnalysisError(f"upstream={upstream!r} is unknown; give heads or all")
    heads = heads_of(model, roots)
    prompts = prompts_of(model, examples)
    sources = sources_of(source, len(prompts))
    forms = Forms(model, prompts)
    found: list[_Seen] = []
    for place, ids in enumerate(tqdm(prompts, desc="tracing", unit="prompt", disable=None)):
        begin = place_of(position, ids, place)
        end = None if sources[place] is None else place_of(sources[place], ids, place)
        found.append(_trace(_Walk(forms, forms.run(ids), rules, place, names or _number), heads, begin, end))
    return _graph(found, ABOUT.attrs(provenance(model), roots=[str(h) for h in heads], prompts=len(prompts),
                                     position=position, source=source, **vars(rules)))  # fmt: skip


def prompts_of(model: HookedModel, examples: Examples) -> list[Tensor]:
    """Ids [position] of every prompt, in their order."""
    rows = {batch.places[0]: batch.ids[0] for batch in batches_of(model, examples, 1)}
    return [rows[place] for place in sorted(rows)]


def heads_of(model: HookedModel, given: str | Sequence[str] | None) -> list[Head]:
    """The heads that are named, or all of them."""
    if given is None:
        return [Head(layer, head) for layer in model.layers for head in range(model.n_heads)]
    heads = [Head.parse(h) for h in (given.replace(",", " ").split() if isinstance(given, str) else given)]
    wrong = [str(h) for h in heads if h.layer not in model.layers or h.head >= model.n_heads]
    if wrong or not heads:
        raise HeadError(f"no such head: {', '.join(wrong) or 'none was named'}; {model!r}")
    return heads


def sources_of(given: int | Sequence[int] | None, count: int) -> Sequence[int | None]:
    """One key per prompt."""
    if given is None or isinstance(given, int):
        return [given] * count
    if len(given) not in (1, count):
        raise AnalysisError(f"source holds {len(given)} positions for {count} prompts; give one or one each")
    return list(given) * (count if len(given) == 1 else 1)


def place_of(position: int | None, ids: Tensor, prompt: int) -> int:
    """A position counted from the front; AnalysisError for one that the prompt does not have."""
    assert position is not None
    if not -len(ids) <= position < len(ids):
        raise AnalysisError(
            f"prompt {prompt} has {len(ids)} tokens and no position {position}; "
            f"give one from {-len(ids)} to {len(ids) - 1}"
        )
    return position % len(ids)


def _number(prompt: int, position: int) -> str:
    return str(position)


@dataclass(frozen=True, eq=False)
class _Walk:
    """A prompt on which signals are traced."""

    forms: Forms
    prompt: Prompt
    rules: Rules
    number: int
    names: Names

    def name(self, head: str, position: int) -> str:
        return f"{head}@{self.names(self.number, position)}"

    def fires_on(self, head: Head, query: int) -> list[int]:
        """The keys on which a head fires from a query."""
        weights = self.prompt.pattern[head.layer][head.head, query]
        keys = (weights >= self.rules.firing).nonzero()[:, 0].tolist()
        if not any(keys):
            return []
        scores = self.scores[head.layer][head.head, query]
        return [key for key in keys if key != 0 and scores[key] >= 0]

    @cached_property
    def scores(self) -> dict[int, Tensor]:
        return {layer: form.scores(self.prompt.x[layer]) for layer, form in self.forms.layers.items()}

    def senders(self, head: Head, query: int, key: int, side: str) -> dict[str, float]:
        """The nodes whose contributions to one side are traced, and these."""
        rules, form = self.rules, self.forms.layers[head.layer]
        parts = form.slices(head.head, query, key)
        x, y = self.prompt.x[head.layer][query], self.prompt.x[head.layer][key]
        chosen = used(parts.terms(x, y), rules.slices)
        signs = (parts.left[chosen] @ x).sign()
        axes, position, own = (parts.left, query, x) if side == "q" else (parts.right, key, y)
        reader = (signs * parts.strength[chosen].sqrt()) @ axes[chosen]
        group = next(g for g in self.forms.wiring.groups if g.layer == head.layer and g.kind == "q")
        names = self.forms.wiring.senders[: group.senders]
        nodes = [n for n, name in enumerate(names) if rules.upstream == "all" or "." in name]
        if not nodes:
            return {}
        spoken = self.prompt.spoken(nodes, head.layer, position, form, rules.constant)
        given = spoken @ reader
        total = float(given.sum())
        if total <= LEAST * float((reader * own).abs().sum()):
            return {}
        return {names[nodes[n]]: float(given[n]) for n in leading(given, total, rules.share).tolist()}


def _trace(walk: _Walk, roots: list[Head], query: int, key: int | None) -> _Seen:
    seen = _Seen()
    todo = [(head, query, j) for head in roots for j in walk.fires_on(head, query) if key in (None, j)]
    met = set(todo)
    while todo:
        head, i, j = todo.pop()
        whole = walk.name(str(head), i)
        seen.nodes[whole] = {"kind": "head", "layer": head.layer, "head": head.head}
        for side, position in (("q", i), ("k", j)):
            reader = walk.name(f"{head}.{side}", position)
            seen.nodes[reader] = {"kind": "input", "layer": head.layer, "input": side}
            seen.inside.add((reader, whole))
            for sender, given in walk.senders(head, i, j, side).items():
                said = walk.name(sender, position)
                seen.edges.setdefault((said, reader), []).append(given)
                if "." not in sender:
                    seen.nodes.setdefault(said, {"kind": sender.split()[0]})
                    continue
                earlier = Head.parse(sender)
                seen.nodes.setdefault(said, {"kind": "head", "layer": earlier.layer, "head": earlier.head})
                more = [(earlier, position, k) for k in walk.fires_on(earlier, position)]
                todo += [pair for pair in more if pair not in met]
                met.update(more)
    return seen


def _graph(found: list[_Seen], attrs: dict[str, Any]) -> nx.DiGraph:
    graph = nx.DiGraph(**attrs)
    weights: dict[tuple[str, str], list[float]] = {}
    for seen in found:
        for name, about in seen.nodes.items():
            if name not in graph:
                graph.add_node(name, **about, count=0)
            graph.nodes[name]["count"] += 1
        for edge in seen.inside:
            graph.add_edge(*edge, kind="inside")
        for edge, given in seen.edges.items():
            weights.setdefault(edge, []).append(float(np.mean(given)))
    for (sender, reader), each in weights.items():
        about = {"input": reader.split("@")[0][-1], "weight": float(np.mean(each)), "count": len(each)}
        graph.add_edge(sender, reader, kind="edge", **about)
    return graph
