"""Signal tracing in one prompt: which heads fire on which pairs, which heads sent the signal, and the walk from the
roots.

The rules are those of sparse attention decomposition (Franco & Crovella 2024, arXiv 2410.00340). The relative variant
asks why this key rather than the weighted mean of all keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import networkx as nx
import torch
from torch import Tensor

from headwater.analyses._streams.score_slices import Forms, Prompt, leading, used
from headwater.analyses.circuits._graphs import told_by_name
from headwater.lens.errors import AnalysisError, HeadError
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head, HeadNames, every_head, named

LEAST = 1e-4  # contributions below this share of what a side reads are rounding errors
Upstream = Literal["heads", "all"]
Names = Callable[[int, int], str]  # (number of the prompt, position) → the position's name
Source = Annotated[int | Sequence[int] | None, "key that roots look at, one or one per prompt; none: any"]


@dataclass(frozen=True)
class Rules:
    """The settings of `trace_signals` of the same names."""

    firing: float
    slices: float
    share: float
    constant: bool
    upstream: Upstream
    relative: bool


@dataclass
class Seen:
    """The trace of one prompt: contributions by edge, the total by input, and the nodes."""

    edges: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    totals: dict[str, list[float]] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    inside: set[tuple[str, str]] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Walk:
    """The walk from readers to senders in one prompt."""

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

    def firings(self, last: int) -> dict[str, int]:
        """On how many pairs each head fires, from queries up to `last`."""
        found = {}
        for layer, weights in self.prompt.pattern.items():
            fires = (weights >= self.rules.firing) & (self.scores[layer] >= 0)
            counts = fires[:, : last + 1, 1:].sum((1, 2)).tolist()
            found |= {str(Head(layer, head)): count for head, count in enumerate(counts)}
        return found

    def senders(self, head: Head, query: int, key: int) -> dict[str, tuple[float, dict[str, float]]]:
        """For each side ("q", "k") the total contribution, and the traced senders with their contributions."""
        rules, form, x = self.rules, self.forms.layers[head.layer], self.prompt.x[head.layer]
        parts, read = form.slices(head.head, query, key), self._keys(head, query, key)
        heard = sum((share * (right @ x[place]) for place, share, right in read), torch.zeros(()))
        chosen = used(parts.strength * (parts.left @ x[query]) * heard, rules.slices)
        signs = (parts.left[chosen] @ x[query]).sign() * parts.strength[chosen].sqrt()
        sides = {"q": [(query, 1.0, parts.left)], "k": read}
        return {
            side: self._given(head, [(place, share * (signs @ axes[chosen])) for place, share, axes in read])
            for side, read in sides.items()
        }

    def _keys(self, head: Head, query: int, key: int) -> list[tuple[int, float, Tensor]]:
        """The positions that the key side reads, each with its weight and its axes [slice, d_model + 1]."""
        form = self.forms.layers[head.layer]
        shares = {key: 1.0}
        if self.rules.relative:
            weights = self.prompt.pattern[head.layer][head.head, query]
            mean = weights / weights.sum()
            for place in mean.nonzero()[:, 0].tolist():
                shares[place] = shares.get(place, 0.0) - float(mean[place])
        return [(place, share, form.keys_at(head.head, query, key, place)) for place, share in shares.items()]

    def _given(self, head: Head, readers: list[tuple[int, Tensor]]) -> tuple[float, dict[str, float]]:
        """Contributions of nodes along the axis [d_model + 1] of each position: the sum, and the leading senders."""
        rules, form, x = self.rules, self.forms.layers[head.layer], self.prompt.x[head.layer]
        group = next(g for g in self.forms.wiring.groups if g.layer == head.layer and g.kind == "q")
        names = self.forms.wiring.senders[: group.senders]
        nodes = [
            n
            for n, name in enumerate(names)
            if rules.upstream == "all" or told_by_name(name)["kind"] == "head"
        ]
        if not nodes:
            return 0.0, {}
        given = torch.zeros(len(nodes), dtype=torch.float64)
        whole = 0.0
        for place, reader in readers:
            given += self.prompt.spoken(nodes, head.layer, place, form, rules.constant) @ reader
            whole += float((reader * x[place]).abs().sum())
        total = float(given.sum())
        if total <= LEAST * whole:
            return total, {}
        return total, {names[nodes[n]]: float(given[n]) for n in leading(given, total, rules.share).tolist()}


def heads_of(model: HookedModel, given: HeadNames | None) -> list[Head]:
    """The named heads; None: all heads."""
    if given is None:
        return every_head(model.layers, model.n_heads)
    heads = named(given, model.layers, model.n_heads)
    if not heads:
        raise HeadError(f'no head is named; give heads of {model!r}, such as "5.1"')
    return heads


def sources_of(given: int | Sequence[int] | None, count: int) -> Sequence[int | None]:
    """One key per prompt."""
    if given is None or isinstance(given, int):
        return [given] * count
    if len(given) not in (1, count):
        raise AnalysisError(f"source holds {len(given)} positions for {count} prompts; give one or one each")
    return list(given) * (count if len(given) == 1 else 1)


def trace(walk: Walk, roots: list[Head], query: int, key: int | None) -> Seen:
    seen = Seen()
    todo = [(head, query, j) for head in roots for j in walk.fires_on(head, query) if key in (None, j)]
    met = set(todo)
    while todo:
        head, i, j = todo.pop()
        whole = walk.name(str(head), i)
        seen.nodes[whole] = {"kind": "head", "layer": head.layer, "head": head.head}
        seen.pairs[whole] = seen.pairs.get(whole, 0) + 1
        for (side, (total, senders)), position in zip(walk.senders(head, i, j).items(), (i, j), strict=True):
            reader = walk.name(f"{head}.{side}", position)
            seen.nodes[reader] = {"kind": "input", "layer": head.layer, "input": side}
            seen.inside.add((reader, whole))
            seen.totals.setdefault(reader, []).append(total)
            for sender, given in senders.items():
                said = walk.name(sender, position)
                seen.edges.setdefault((said, reader), []).append(given)
                about = seen.nodes.setdefault(said, told_by_name(sender))
                if about["kind"] != "head":
                    continue
                earlier = Head.parse(sender)
                more = [(earlier, position, k) for k in walk.fires_on(earlier, position)]
                todo += [pair for pair in more if pair not in met]
                met.update(more)
    return seen


def possible(model: HookedModel, walk: Walk, found: list[Seen]) -> int:
    """The number of edges that a trace could have at the positions that it met, for chance."""
    upstream, wiring = walk.rules.upstream, walk.forms.wiring
    positions = {name.partition("@")[2] for seen in found for name in seen.nodes}
    total = 0
    for group in wiring.groups:
        if group.kind == "q":
            kinds = [told_by_name(name)["kind"] for name in wiring.senders[: group.senders]]
            total += 2 * model.n_heads * (len(kinds) if upstream == "all" else kinds.count("head"))
    return total * len(positions)


def statistics(graph: nx.DiGraph) -> dict[str, int]:
    """The size of a trace, counted as in the paper: a head at a position is one node whether it reads or writes there,
    and connections are the edges from heads."""
    names = {name for name, kind in graph.nodes(data="kind") if kind in ("head", "input")}
    merged = {re.sub(r"^(\d+\.\d+)\.[qk]@", r"\1@", name) for name in names}
    edges = [u for u, _, kind in graph.edges(data="kind") if kind == "edge"]
    from_heads = [u for u in edges if graph.nodes[u]["kind"] == "head"]
    return {"head_nodes": len(merged), "edges": len(edges), "edges_from_heads": len(from_heads)}
