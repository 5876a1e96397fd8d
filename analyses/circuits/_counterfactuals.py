"""Counterfactual outputs of nodes, and runs in which chosen edges carry them.

A changed edge gives one input the counterfactual output of its node: the output on the corrupt prompt ("resample"), the
mean over positions and corrupt prompts ("mean"), or zero ("zero"). Every run recomputes all nodes. A run with every
edge changed therefore equals the corrupt run, and a run with none equals the clean run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._measures.pair_scores import Asked, Told
from headwater.analyses._prompts.examples import Batch
from headwater.analyses._prompts.pairs import Pairs
from headwater.analyses._streams.component_graph import EMBED, Inputs, Wiring
from headwater.analyses.circuits._graphs import leading
from headwater.lens.edits.heads import Ablation
from headwater.lens.models.closeness import close_or_refuse, of_sums, rounding_mend
from headwater.lens.progress import progress

TOGETHER = 2**28  # bytes of counterfactual outputs of all copies that run together
MOST = 64  # copies


@dataclass(frozen=True, eq=False)
class Case:
    """A batch of pairs, its score, and the outputs of all nodes: counterfactual (`other`), and clean less it (`drop`).

    Both are [node, pair, position, d_model].
    """

    pairs: Pairs
    told: Told
    drop: Tensor
    other: Tensor


def cases_of(wiring: Wiring, batches: list[Pairs], asked: Asked, ablation: Ablation) -> list[Case]:
    """Run every pair clean and corrupt once. AnalysisError where the stream is not the sum of the nodes."""
    found = []
    with torch.no_grad():
        for pairs in batches:
            clean, sent, streams = _run(wiring, pairs.clean)
            corrupt, other, others = _run(wiring, pairs.corrupt)
            drop = sent.sub_(other)  # in the place of the clean outputs: each is as large as all activations
            _check_sums(wiring, streams, others, drop)
            found.append(Case(pairs, asked.told(wiring.model, pairs, clean, corrupt), drop, other))
        if ablation == "resample":
            return found
        count = sum(case.other[0, :, :, 0].numel() for case in found)
        mean = torch.stack([case.other.sum((1, 2), keepdim=True) for case in found]).sum(0) / count
        said = torch.zeros_like(mean) if ablation == "zero" else mean
        return [
            replace(case, drop=case.drop + (case.other - said), other=said.expand_as(case.other))
            for case in found
        ]


def _run(wiring: Wiring, ids: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, the output of each node [node, pair, position, d_model], and the stream that each group reads."""
    streams = []

    def reads(group: Inputs, x: Tensor, sent: list[Tensor]) -> None:
        streams.append(x)

    logits, sent = wiring.run(ids, reads)
    return logits, torch.stack(sent), streams


def _check_sums(wiring: Wiring, clean: list[Tensor], other: list[Tensor], nodes: Tensor) -> None:
    allowed = of_sums(wiring.model)
    total, added = (
        torch.zeros_like(nodes[0]),
        0,
    )  # groups stand in the order of a run, so each adds to the last one's
    for group, x, y in zip(wiring.groups, clean, other, strict=True):
        total, added = total + nodes[added : group.senders].sum(0), group.senders
        reads = f"what {group.names[0]} of {wiring.model.name} reads"
        what = f"{reads} is not the sum of the embedding, heads and MLPs before it"
        then = f", so its edges are not known{rounding_mend(wiring.model)}"
        close_or_refuse(total, x - y, what, then, allowed=allowed)


def changed(wiring: Wiring, case: Case, edges: Tensor) -> Tensor:
    """The measure [copy, pair] with the edges `edges` [copy, node, input] changed."""
    return case.told.value(changed_logits(wiring, case, edges)).unflatten(0, (len(edges), -1))


def changed_logits(wiring: Wiring, case: Case, edges: Tensor) -> Tensor:
    """Logits [copy · pair, position, vocab] with `edges` [copy, node, input] changed, copy after copy.

    What an input reads that leads nowhere makes no difference, so it is left as it is. The stream of an input is that
    of the run with its changed edges replaced, or that of counterfactual outputs alone with its other edges replaced,
    whichever are fewer.
    """
    copies = len(edges)
    open_ends = leading(wiring, wiring.edges() & ~edges)
    other = case.other.repeat(1, copies, 1, 1)
    rows = (edges & open_ends[:, None]).repeat_interleave(len(case.pairs.clean), 0).to(other.device)
    lost: list[Tensor] = []  # counterfactual output less that of the run, by node
    said = torch.zeros_like(other[0])  # the sum of counterfactual outputs

    def reads(group: Inputs, x: Tensor, sent: list[Tensor]) -> Tensor | None:
        nonlocal said
        which = rows[:, : group.senders, group.span].any(0).any(0).nonzero()[:, 0]
        if not len(which):
            return None
        said = said + other[len(lost) : group.senders].sum(0)
        lost.extend(other[node] - sent[node] for node in range(len(lost), group.senders))
        out = rows[:, : group.senders, group.span][:, :, which]
        few, many = (mask.any(0).any(1).nonzero()[:, 0] for mask in (out, ~out))
        if len(few) <= len(many):
            changed = x[:, None] + _sum(out, lost, few)
        else:
            changed = (said + wiring.constants(group).to(said))[:, None] - _sum(~out, lost, many)
        if len(which) == len(group.names):
            return changed.expand(-1, len(which), -1, -1)
        found = x[:, None].repeat(1, len(group.names), 1, 1)
        found[:, which] = changed.expand(-1, len(which), -1, -1)
        return found

    with torch.no_grad():
        return wiring.run(Batch(case.pairs.clean, case.pairs.places).copies(copies).ids, reads)[0]


def _sum(edges: Tensor, lost: list[Tensor], nodes: Tensor) -> Tensor:
    """What edges [row, node, input] from some nodes lose, summed for each input, [row, input, position, d_model]."""
    if not len(nodes):
        return torch.zeros_like(lost[0])[:, None]
    parts = torch.stack([lost[node] for node in nodes.tolist()])
    return torch.einsum("bur,ubsd->brsd", edges[:, nodes].to(parts), parts)


def measures_of(wiring: Wiring, cases: list[Case], edges: Tensor, desc: str) -> np.ndarray:
    """The measure with `edges` [change, node, input] changed, of each change and pair.

    Equal changes run once and a change of nothing that leads to the logits not at all. As many copies run together as
    fit into `TOGETHER` bytes of counterfactual outputs.
    """
    edges = edges & leading(wiring, wiring.edges() & ~edges)[:, None]
    apart, which = torch.unique(edges.flatten(1), dim=0, return_inverse=True)
    apart = apart.unflatten(1, edges.shape[1:])
    found = np.zeros((len(apart), sum(len(case.pairs.places) for case in cases)))
    some = apart.any(2).any(1)
    with progress(desc=desc, unit="run", total=int(some.sum()) * len(cases)) as bar:
        for case in cases:
            found[:, case.pairs.places] = case.told.clean
            size = case.other[..., 0].numel() * case.other.shape[-1] * case.other.element_size()
            for places in some.nonzero()[:, 0].split(max(1, min(MOST, TOGETHER // size))):
                measured = changed(wiring, case, apart[places]).double().cpu()
                found[np.ix_(places.tolist(), case.pairs.places)] = measured
                bar.update(len(places))
    return found[which.numpy()]


def slopes(
    wiring: Wiring, case: Case, first: int = 0, said: Tensor | None = None, scored: slice | None = None,
    *, of_nodes: bool = False,
) -> Tensor:  # fmt: skip
    """Scores of edges [pair, node, input] at one point, or of nodes [pair, node].

    A score is what a node says more on the clean prompt, times the gradient of the measure at the input, or at the
    node; `scored` are the nodes that get any (all), the others' are 0. `said` [node, pair, position, d_model] replaces
    the outputs of the nodes from number `first` on. The gradients at the inputs are larger than all else and are never
    held together; those at the nodes are as large as all outputs, so that scores of edges do without them.
    """
    drop = case.drop
    scored = slice(0, len(drop)) if scored is None else scored
    scores = drop.new_zeros(drop.shape[1], len(drop), len(wiring.receivers))
    of_pairs = drop.transpose(0, 1).flatten(2)  # [pair, node, position · d_model], a view
    voices: list[Tensor] = []

    def reads(group: Inputs, x: Tensor, sent: list[Tensor]) -> Tensor:
        senders = slice(scored.start, min(scored.stop, group.senders))

        def seen(slope: Tensor) -> None:
            scores[:, senders, group.span] = of_pairs[:, senders] @ slope.flatten(2).mT

        return cast(Tensor, _Read.apply(x, len(group.names), seen))

    def sends(start: int, outputs: Tensor) -> Tensor:
        if said is not None and start == first:
            outputs = said
        if (
            start and not of_nodes
        ):  # every input reads the embedding, so its gradient passes through all of them
            return outputs
        voice = torch.zeros_like(outputs).requires_grad_()
        voices.append(voice)
        return outputs + voice

    with torch.enable_grad():
        logits, _ = wiring.run(case.pairs.clean, reads, sends, grad=True)
        total = case.told.value(logits).sum()
        found = torch.autograd.grad(total, voices, materialize_grads=True)
    if not of_nodes:
        return scores
    products = torch.cat([(drop[at : at + len(slope)] * slope).sum((2, 3)) for at, slope in _numbered(found)])
    of_each = products.new_zeros(len(drop), drop.shape[1])
    of_each[scored] = products[scored]
    return of_each.mT


def _numbered(parts: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Each part with the number of its first node."""
    at = 0
    for part in parts:
        yield at, part
        at += len(part)


class _Read(torch.autograd.Function):
    """A stream as each of some inputs reads it, [batch, input, position, d_model]; `seen` gets the gradients there."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, count: int, seen: Callable[[Tensor], None]) -> Tensor:
        ctx.seen = seen
        return stream[:, None].expand(-1, count, -1, -1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        ctx.seen(slopes[0])
        return slopes[0].sum(1), None, None


def nodes_of_layers(wiring: Wiring) -> list[slice]:
    """Nodes whose outputs are computed together: the embedding, the heads of one layer, one cross-attention, one
    MLP."""
    starts = [0]
    for place, name in enumerate(wiring.senders):
        if name != EMBED and (name.endswith(".0") or name.startswith(("mlp", "cross"))):
            starts.append(place)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(wiring.senders)], strict=True)]
