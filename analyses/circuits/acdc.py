"""ACDC: the circuit that remains after removing, one after another, every edge whose removal costs little.

Conmy et al. 2023 (arXiv 2304.14997), as a baseline: one forward pass per edge and batch, and the result depends on the
order of the edges. For circuits of large models use `edge_attribution`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Seed
from headwater.analyses._measures.bootstrap import redraws
from headwater.analyses._measures.measure import AnswerSetting, PositionSetting, WrongSetting
from headwater.analyses._measures.pair_scores import Asked, PairMeasure
from headwater.analyses._measures.stability import told_of, unknown
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.pairs import PairExamples, pairs_of, side_by_side
from headwater.analyses._streams.component_graph import EMBED, KeyValues, Wiring
from headwater.analyses.circuits._counterfactuals import Case, cases_of, changed, changed_logits
from headwater.analyses.circuits._exact_edges import SOON, span
from headwater.analyses.circuits._graphs import HEAD_INPUTS, connected, graph_of, pruned
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress

ROWS = 64  # prompts in one forward pass


@analysis
def acdc(
    model: HookedModel,
    pairs: Examples | PairExamples,
    corrupt: Examples | None = None,
    measure: PairMeasure = "logit_difference",
    tau: Annotated[float, "an edge that costs less is taken out", Bounds(0)] = 0.01,
    metric: Annotated[Literal["kl", "measure"], "what counts as a cost"] = "kl",
    ablation: Annotated[Ablation, "what an edge that is out carries"] = "resample",
    key_values: Annotated[KeyValues, "grouped queries: keys per query head or per KV head"] = "head",
    inputs: Annotated[bool, "also try each head's whole input of queries, keys or values"] = False,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    batch_size: BatchSize = 16,
    draws: Annotated[int, "redraws of the pairs for the stability, a walk each; 0: none", Bounds(0)] = 0,
    seed: Seed = 0,
) -> nx.DiGraph:
    """The edges whose removal costs `tau` or more, each with that cost as `score`.

    Inputs are visited from the logits down, and the edges into each input from the latest node to the earliest. An edge
    is removed for good if `cost(without it) - cost(so far) < tau`. The cost is the mean over pairs of `KL(clean ‖ now)`
    of the next token at `position` or of the classes, in nats, or minus the measure. A removed edge carries the
    counterfactual of `ablation`, as in `edge_attribution`. Edges into a node that no longer leads anywhere are removed
    without a run.

    With `inputs` the edge from each input of queries, keys or values to its head is tried first, as the authors' code
    tries it: all edges into the input are changed at once. If that costs less than `tau` they are all removed, and no
    edge is tried by itself. Else the edge of kind "inside" from the input to the head carries that cost as `cost`.

    With `draws` the pairs are redrawn with replacement that many times and the walk goes anew. The attribute
    `stability` is the mean share `|a ∩ b| / |a ∪ b|` of the circuit's edges and those of these walks,
    `stability_by_chance` that of random sets of these sizes. A run says before the first of them how long they take.

    Question: Which connections are left when every one that is not missed is taken out?
    Unit: what taking the edge out costs when its turn comes: nats (kl) or the measure.
    Source: Conmy et al. 2023, arXiv:2304.14997; compared with the authors' code. That code tries the edges from inputs
    to queries, keys and values too (`inputs`), and under "mean" and "zero" changes the queries themselves, not the
    stream that they are made of.
    Cost: one forward pass per edge and batch, several at once while edges are taken out; `inputs` saves most of them;
    all of it again for each of `draws`.
    Not for: ranking edges; edges that back each other up, of which the order decides which one stays.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> graph = hw.analyses.acdc(model, [("John gave", "Mary gave")], tau=100.0)
    >>> list(graph)
    ['embed', 'logits']
    """
    pairs = side_by_side(model, pairs, corrupt)
    if draws and len(pairs) == 1:
        raise AnalysisError(f"draws={draws} redraws the pairs, and there is one; give more pairs, or draws=0")
    wiring = Wiring(model, key_values)
    asked = Asked(measure, answer, wrong, position)
    cases = cases_of(wiring, pairs_of(model, pairs, batch_size), asked, ablation)
    known = wiring.edges()
    nothing = torch.zeros_like(known)[None]
    clean = [_next_tokens(wiring, case, nothing, position) if metric == "kl" else nothing for case in cases]

    def costs(times: np.ndarray, out: Tensor) -> list[float]:
        total = torch.zeros(len(out), dtype=torch.float64)
        for case, full in zip(cases, clean, strict=True):
            if metric == "kl":
                now = _next_tokens(wiring, case, out, position)
                each = (full.exp() * (full - now)).sum(2).cpu()
            else:
                each = -changed(wiring, case, out).double().cpu()
            total += each @ torch.from_numpy(times[case.pairs.places]).double()
        return (total / len(pairs)).tolist()

    def walk(times: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        """With each pair as often as it is drawn."""
        return _visited(wiring, known, partial(costs, times), tau, most, inputs)

    most = max(1, ROWS // max(len(case.pairs.places) for case in cases))
    begun = time.perf_counter()
    scores, inside = walk(np.ones(len(pairs)))
    graph = graph_of(wiring, scores, {"pairs": len(pairs), **asked.settings})
    if draws:
        seconds = draws * (time.perf_counter() - begun)
        long = f", {span(seconds)}" if seconds > SOON else ""
        picks = redraws(len(pairs), draws, seed)
        others = [
            _edges(wiring, walk(np.bincount(pick, minlength=len(pairs)))[0])
            for pick in progress(picks, desc=f"acdc, {draws} redraws of the pairs{long}", unit="walk")
        ]
        over = f"{draws} redraws of {len(pairs)} pairs"
        graph.graph.update(told_of(_edges(wiring, scores), others, int(known.sum()), over))
    else:
        graph.graph.update(unknown(_why(len(pairs))))
    for receiver, cost in inside.items():
        for head in wiring.heads_of(receiver):
            graph.edges[receiver, head]["cost"] = cost
    graph.remove_edges_from([(u, v) for u, v, s in graph.edges(data="score") if s is not None and s != s])
    return pruned(graph)


def _edges(wiring: Wiring, scores: Tensor) -> set[tuple[int, ...]]:
    """The edges of a circuit that has a score on each that it keeps, pruned."""
    kept = wiring.edges() & ~scores.isnan()
    return set(map(tuple, connected(wiring, kept[None])[0].nonzero().tolist()))


def _why(count: int) -> str:
    """Why the stability of a circuit is not known."""
    asked = "draws=0; draws=20 redraws the pairs, a walk for each"
    return asked if count > 1 else "one pair, so there is nothing to redraw"


def _next_tokens(wiring: Wiring, case: Case, out: Tensor, position: int) -> Tensor:
    """Log-probabilities of the token after `position` or of the classes, [copy, pair, token], in float64."""
    logits = changed_logits(wiring, case, out)
    if logits.dim() == 1:
        raise AnalysisError(f"{wiring.model.name} gives similarities and no logits; take metric='measure'")
    row = logits[:, position] if logits.dim() == 3 else logits
    return row.double().log_softmax(-1).unflatten(0, (len(out), -1))


def _visited(
    wiring: Wiring, known: Tensor, costs: Callable[[Tensor], list[float]], tau: float, most: int, inputs: bool
) -> tuple[Tensor, dict[str, float]]:
    """The cost of each kept edge, [node, input]; NaN for removed edges. And that of each head's input that was kept.

    Several steps run in one batch, on the assumption that each of their edges will be removed, as most are. Results
    after the first edge that stays are discarded, and the next batch is shorter.
    """
    out, scores = torch.zeros_like(known), torch.full(known.shape, torch.nan, dtype=torch.float64)
    so_far, size = costs(out[None])[0], 1
    alive, inside = {"logits"}, dict[str, float]()
    for group in progress(list(reversed(wiring.groups)), desc="acdc", unit="layer input"):
        for number, receiver in reversed(list(enumerate(group.names, group.first))):
            of_head = group.kind in HEAD_INPUTS
            owners = wiring.heads_of(receiver) if of_head else [receiver]
            if not alive.intersection(owners):
                out[: group.senders, number] = True
                continue
            if inputs and of_head:
                whole = out.clone()
                whole[: group.senders, number] = True
                now = costs(whole[None])[0]
                if now - so_far < tau:
                    out, so_far = whole, now
                    continue
                inside[receiver] = now - so_far
            left = list(reversed(range(group.senders)))
            while left:
                some = left[:size]
                tried = out.repeat(len(some), 1, 1)
                for step, sender in enumerate(some):
                    tried[step:, sender, number] = True
                size = min(2 * size, most)
                for sender, now in zip(some, costs(tried), strict=True):
                    del left[0]
                    if now - so_far >= tau:
                        scores[sender, number] = now - so_far
                        if wiring.senders[sender] != EMBED:
                            alive.add(wiring.senders[sender])
                        size = max(size // 4, 1)
                        break
                    out[sender, number], so_far = True, now
    return scores, inside
