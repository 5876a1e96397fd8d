"""What edges carry when they are changed, and runs in which chosen edges carry it.

A changed edge hands the counterfactual output of its node to one input: that of the corrupt prompt ("resample"), its
mean over positions and corrupt prompts ("mean"), or nothing ("zero"). All nodes are computed anew on the way, so a
run with every edge changed is the corrupt run, and one with none the clean run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwater.analyses._measures.pair_scores import Asked, Told
from headwater.analyses._prompts.pairs import Pairs
from headwater.analyses._streams.component_graph import EMBED, Inputs, Wiring
from headwater.lens.edits.heads import Ablation
from headwater.lens.models.closeness import close_or_refuse, rounding_mend


@dataclass(frozen=True, eq=False)
class Case:
    """A batch of pairs with what is asked of it, and what its nodes say, [node, pair, position, d_model], clean and
    when changed."""

    pairs: Pairs
    told: Told
    clean: Tensor
    other: Tensor

    @property
    def drop(self) -> Tensor:
        """What each node loses when it is changed, [node, pair, position, d_model]."""
        return self.clean - self.other


def cases_of(wiring: Wiring, batches: list[Pairs], asked: Asked, ablation: Ablation) -> list[Case]:
    """Run every pair clean and corrupt once. AnalysisError where the stream is not the sum of the nodes."""
    found = []
    with torch.no_grad():
        for pairs in batches:
            clean, streams = _streams(wiring, pairs.clean)
            corrupt, other = _streams(wiring, pairs.corrupt)
            _check_sums(wiring, streams, other, clean[1] - corrupt[1])
            told = asked.told(wiring.model, pairs, clean[0], corrupt[0])
            found.append(Case(pairs, told, clean[1], corrupt[1]))
        if ablation == "resample":
            return found
        count = sum(case.other[0, :, :, 0].numel() for case in found)
        mean = torch.stack([case.other.sum((1, 2), keepdim=True) for case in found]).sum(0) / count
        said = torch.zeros_like(mean) if ablation == "zero" else mean
        return [replace(case, other=said.expand_as(case.clean)) for case in found]


def _streams(wiring: Wiring, ids: Tensor) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    streams = []

    def reads(group: Inputs, x: Tensor, sent: list[Tensor]) -> None:
        streams.append(x)

    logits, sent = wiring.run(ids, reads)
    return (logits, torch.stack(sent)), streams


def _check_sums(wiring: Wiring, clean: list[Tensor], other: list[Tensor], nodes: Tensor) -> None:
    for group, x, y in zip(wiring.groups, clean, other, strict=True):
        reads = f"what {group.names[0]} of {wiring.model.name} reads"
        what = f"{reads} is not the sum of the embedding, heads and MLPs before it"
        then = f", so its edges are not known{rounding_mend(wiring.model)}"
        close_or_refuse(nodes[: group.senders].sum(0), x - y, what, then)


def changed(wiring: Wiring, case: Case, edges: Tensor) -> Tensor:
    """The measure [copy, pair] with some edges changed: `edges` [copy, node, input], 1 where an edge is."""
    copies, size = len(edges), len(case.pairs.clean)
    logits = changed_logits(wiring, case, edges)
    return case.told.value(logits).unflatten(0, (copies, size))


def changed_logits(wiring: Wiring, case: Case, edges: Tensor) -> Tensor:
    """Logits [copy · pair, position, vocab], one copy of all pairs after another."""
    copies = len(edges)
    other = case.other.repeat(1, copies, 1, 1)
    rows = edges.to(other).repeat_interleave(len(case.pairs.clean), 0)
    lost: dict[int, Tensor] = {}

    def reads(group: Inputs, x: Tensor, sent: list[Tensor]) -> Tensor | None:
        mine = rows[:, : group.senders, group.span]
        if not mine.any():
            return None
        if group.senders not in lost:
            lost.clear()
            lost[group.senders] = other[: group.senders] - torch.stack(sent[: group.senders])
        return x[:, None] + torch.einsum("bur,ubsd->brsd", mine, lost[group.senders])

    with torch.no_grad():
        return wiring.run(case.pairs.clean.repeat(copies, 1), reads)[0]


def slopes(wiring: Wiring, case: Case, first: int = 0, said: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Gradients of the measure at each input [pair, input, position, d_model] and each node [node, pair, …].

    `said` [node, pair, position, d_model] takes the place of what the nodes from number `first` on say.
    """
    leaves: list[Tensor] = []
    voices: list[Tensor] = []

    def reads(group: Inputs, x: Tensor, sent: list[Tensor]) -> Tensor:
        leaf = x.new_zeros(len(x), len(group.names), *x.shape[1:]).requires_grad_()
        leaves.append(leaf)
        return x[:, None] + leaf

    def sends(start: int, outputs: Tensor) -> Tensor:
        if said is not None and start == first:
            outputs = said
        voice = torch.zeros_like(outputs).requires_grad_()
        voices.append(voice)
        return outputs + voice

    with torch.enable_grad():
        logits, _ = wiring.run(case.pairs.clean, reads, sends, grad=True)
        total = case.told.value(logits).sum()
        found = torch.autograd.grad(total, [*leaves, *voices], allow_unused=True)
    whole = [
        torch.zeros_like(leaf) if slope is None else slope
        for leaf, slope in zip([*leaves, *voices], found, strict=True)
    ]
    return torch.cat(whole[: len(leaves)], 1).detach(), torch.cat(whole[len(leaves) :]).detach()


def nodes_of_layers(wiring: Wiring) -> list[slice]:
    """Nodes that speak at once: the embedding, the heads of a layer, an MLP."""
    starts = [0]
    for place, name in enumerate(wiring.senders):
        if name != EMBED and (name.endswith(".0") or name.startswith("mlp")):
            starts.append(place)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(wiring.senders)], strict=True)]
