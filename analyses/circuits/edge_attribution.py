"""Edge attribution: how much each connection between two parts of a model carries of the difference of two prompts.

EAP (Syed, Rager & Conmy 2023, arXiv 2310.10348) and EAP-IG (Hanna, Pezzelle & Belinkov 2024, arXiv 2403.17806) estimate
the effect of an edge from a gradient; `how="exact"` measures it. Grouped queries, parallel blocks and norms behind the
heads are supported. Where attention saturates the gradient is near 0 even on edges that matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Seed
from headwater.analyses._measures.bootstrap import LEVEL, bounds, redraws
from headwater.analyses._measures.measure import AnswerSetting, PositionSetting, WrongSetting
from headwater.analyses._measures.pair_scores import Asked, PairMeasure
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.pairs import PairExamples, pairs_of, side_by_side
from headwater.analyses._streams.component_graph import KeyValues, Wiring
from headwater.analyses._streams.redraws import Redraws, keep_examples
from headwater.analyses.circuits._counterfactuals import Case, cases_of, nodes_of_layers, slopes
from headwater.analyses.circuits._exact_edges import drawn, exact_scores
from headwater.analyses.circuits._finished_scores import Finished
from headwater.analyses.circuits._graphs import graph_of, select_circuit as select_circuit
from headwater.lens.attention import backward_rules
from headwater.lens.attention.backward_rules import BackwardRule
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress

How = Literal["inputs", "activations", "activations_released", "clean_corrupt", "exact"]
TOGETHER = 4096  # edges whose means are resampled at once, to bound memory


@analysis
def edge_attribution(
    model: HookedModel,
    pairs: Examples | PairExamples,
    corrupt: Examples | None = None,
    measure: PairMeasure = "logit_difference",
    steps: Annotated[int, "points between corrupt and clean; 1 is EAP", Bounds(1, 1000)] = 5,
    how: Annotated[How, "where the gradient is taken, or the effect of every edge itself"] = "inputs",
    level: Annotated[Literal["edge", "node"], "what gets a score"] = "edge",
    ablation: Annotated[Ablation, "what a changed edge carries"] = "resample",
    key_values: Annotated[KeyValues, "grouped queries: keys per query head or per KV head"] = "head",
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    draws: Annotated[int, "resamples of the pairs for the intervals", Bounds(1)] = 1000,
    seed: Seed = 0,
    per_pair: Annotated[bool, "keep the score of every pair too"] = False,
    batch_size: BatchSize = 8,
    rule: Annotated[BackwardRule, "what the backward pass follows"] = "gradient",
    sample: Annotated[int | None, "exact: as many edges drawn at random; none: every one", Bounds(1)] = None,
    resume: Annotated[str | Path | None, "file of finished batches to resume from; none: no file"] = None,
) -> nx.DiGraph:
    """Every edge u → v with `score` = mean over pairs of `Σ_{position,d} (a_u(clean) - a_u(corrupt)) · ∂m/∂in_v`.

    `a_u` is the output that node u adds to the residual stream. `in_v` is the stream that input v reads, before its
    norm; the gradient goes through that norm. The score estimates, to first order, how far m drops when the edge is
    changed: a positive edge helps. `steps=1` takes the gradient on the clean prompt (EAP). `how="inputs"` averages it
    over the embeddings `e_corrupt + k/steps·(e_clean - e_corrupt)`, k = 0 … steps - 1 (EAP-IG). "activations"
    interpolates the outputs of one layer's nodes at a time instead of the embeddings, for the edges out of these nodes.
    "activations_released" is EAP-IG-activations as its authors' code has it: at each of these sites in turn, at
    k = 1 … steps, the gradients of all edges are taken, also of those whose node does not move, and averaged over
    sites and steps. "clean_corrupt" averages the two ends. "exact" is the drop itself, `m(clean) - m(clean with the
    edge changed)`. `level="node"` scores nodes: all edges of a node are changed.

    With `sample`, "exact" changes that many edges (or nodes), drawn at random by `seed`; the others have no score, so
    that a circuit chosen from the graph holds none of them. A long run says before it begins how long it will take,
    measured on its first pass. With `resume` every finished batch, or pass of "exact", is saved to that file; the same
    call then goes on, and a finished file gives the result without a run of it. AnalysisError if the file belongs to
    other prompts, models, settings or values of the measure. It is JSON text.

    `rule` puts something else in the place of the gradient, as `patch` says of its estimates; with `steps=1` it is
    RelP or GIM for edges. "relp" holds attention weights constant, so edges into queries and keys get 0.

    `pairs` are (clean, corrupt) texts, ids or other examples of equal length, or examples of a prompt set; or `pairs`
    are the clean prompts and `corrupt` the others. m is the logit of `answer`
    minus that of `wrong` at `position` (default: the example's tokens, or the model's predictions on the two prompts),
    or `measure(logits) → [pair]`. Nodes are "embed", "5.1", "mlp.3" and "logits"; inputs are "5.1.q", or "5.kv0.k" with
    `key_values="kv"`; edges of kind "inside" join inputs to heads. AnalysisError for a model whose residual stream is
    not the sum of its nodes.

    The graph is of the model's part: a tower of images, an encoder, a decoder, in which the cross-attention of a layer
    is one node "cross.3" that reads the encoder besides. "logits" is all that reads the stream behind the last block.
    What the part does not read, as the decoder's text in the graph of an encoder, stays the clean example's.

    From two pairs on, `low` and `high` of an edge (or node) bound 95 % of the means of resampled pairs, the same
    resamples for all edges; they leave out the error of the first-order estimate. `per_pair` adds `scores`, one per
    pair (JSON). The attribute `stability` says how much of the best is best again: the mean share `|a ∩ b| / |a ∪ b|`
    of the 1 % and the 10 % of edges (or nodes) with the largest |score| and those of 100 resamples, as JSON by part;
    `stability_by_chance` is that of random sets. A circuit that `select_circuit` chooses has its own: for that, every
    edge keeps its scores in `by_example` (32-bit floats in base64; left out above 16,777,216 of them).

    Question: Which connections between heads and MLPs carry what makes the difference?
    Unit: drop of the measure when the edge is changed, mean over pairs (positive: the edge helps).
    Source: Syed et al. 2023, arXiv:2310.10348; Hanna et al. 2024, arXiv:2403.17806; compared with the authors' code,
    but "activations" is ours: what the authors run under that name is "activations_released", and ranks differ.
    Cost: two passes and `steps` forward and backward passes per batch, for activations that many per site; exact: a
    pass per edge, many at once.
    Not for: edges that back each other up, of which each looks needless; saturated attention (gradients alone).

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> clean = "When Mary and John went to the store , John gave a drink to"
    >>> corrupt = "When Mary and John went to the store , Mary gave a drink to"
    >>> graph = hw.analyses.edge_attribution(model, [(clean, corrupt)], answer="Mary", wrong="John", steps=1)
    >>> max((score, u, v) for u, v, score in graph.edges(data="score") if score is not None)[1:]
    ('mlp.3', 'logits')
    """
    pairs = side_by_side(model, pairs, corrupt)
    wiring = Wiring(model, key_values)
    asked = Asked(measure, answer, wrong, position)
    batches = pairs_of(model, pairs, batch_size)
    _refuse(how, rule, sample)
    measured = drawn(wiring, level, sample, seed)
    told = {
        "analysis": "edge_attribution", "how": how, "steps": steps, "level": level, "ablation": ablation, "rule": rule,
        "key_values": key_values, "sample": sample and [sample, seed], **asked.settings,
    }  # fmt: skip
    with Finished.open(resume, model, batches, **told) as finished:
        if how == "exact":
            scores = exact_scores(wiring, cases_of(wiring, batches, asked, ablation), measured, finished)
        else:
            scores = torch.zeros(len(pairs), *measured.shape, dtype=torch.float64)
            with progress(desc="edge attribution", unit="batch", total=len(batches)) as bar:
                # the mean is over all pairs; else one batch at a time is in memory
                for some in [batches] if ablation == "mean" else [[batch] for batch in batches]:
                    for case in cases_of(wiring, some, asked, ablation):
                        compute = partial(_scored, wiring, case, how, steps, level, rule)
                        scores[case.pairs.places] = finished.scores("all", case, compute)
                        bar.update()
    attrs = {"pairs": len(pairs), "interval": LEVEL, "seed": seed, **asked.settings}
    mean = scores.mean(0)
    graph = graph_of(wiring, None, attrs, mean) if level == "node" else graph_of(wiring, mean, attrs)
    _spread(wiring, graph, scores.numpy(), measured.numpy(), draws, seed, per_pair)
    return graph


def _refuse(how: str, rule: str, sample: int | None) -> None:
    """AnalysisError for settings that have no meaning together."""
    if how == "exact" and rule != "gradient":
        raise AnalysisError(f'how="exact" takes no gradient, so rule={rule!r} has no meaning; leave it out')
    if how != "exact" and sample is not None:
        raise AnalysisError(
            f'how={how!r} scores every edge in the same passes, so sample={sample} has no meaning; give how="exact"'
        )


def _spread(
    wiring: Wiring, graph: nx.DiGraph, scores: np.ndarray, measured: np.ndarray, draws: int, seed: int,
    per_pair: bool,
) -> None:  # fmt: skip
    """Write the interval of each score [pair, node] or [pair, node, input] to the graph, and the scores if asked; what
    was not measured loses its score.
    """
    count, of_nodes = len(scores), measured.ndim == 1
    known = np.ones_like(measured) if of_nodes else wiring.edges().numpy()

    def about(places: tuple[np.ndarray, ...]) -> list[dict[str, Any]]:
        ends = zip(places, (wiring.senders, wiring.receivers), strict=False)
        names = zip(*([side[n] for n in place] for place, side in ends), strict=True)
        return [graph.nodes[name[0]] if of_nodes else graph.edges[name] for name in names]

    for each in about((known & ~measured).nonzero()):
        del each["score"]
    places = measured.nonzero()
    told = about(places)
    times = [np.bincount(pick, minlength=count) for pick in redraws(count, draws, seed)]
    weights = np.stack(times) / count  # [draw, pair]
    keep_examples(told, scores[(slice(None), *places)])
    graph.graph.update(Redraws.of(graph).told_of_parts())
    for start in range(0, len(told), TOGETHER):
        each = scores[(slice(None), *(place[start : start + TOGETHER] for place in places))]  # [pair, edge]
        low, high = bounds(weights @ each)
        for n, one in enumerate(told[start : start + TOGETHER]):
            if count > 1:
                one.update(low=float(low[n]), high=float(high[n]))
            if per_pair:
                one["scores"] = json.dumps(each[:, n].tolist())


def _scored(wiring: Wiring, case: Case, how: How, steps: int, level: str, rule: BackwardRule) -> Tensor:
    """Each edge's score [pair, node, input], or each node's [pair, node], by the backward passes of `rule`."""
    with backward_rules.following(rule):
        return _followed(wiring, case, how, steps, level)


def _followed(wiring: Wiring, case: Case, how: How, steps: int, level: str) -> Tensor:
    parts: list[tuple[slice, Iterable[Tensor]]] = []
    everyone, drops, of_nodes = slice(0, len(wiring.senders)), case.drop, level == "node"
    if how == "clean_corrupt":
        ends = (None, case.other[:1])
        parts.append((everyone, (slopes(wiring, case, 0, said, of_nodes=of_nodes) for said in ends)))
    elif how == "activations_released":
        points = (
            slopes(wiring, case, site.start, case.other[site] + k / steps * drops[site], of_nodes=of_nodes)
            for site in nodes_of_layers(wiring)
            for k in range(1, steps + 1)
        )
        parts.append((everyone, points))
    elif steps == 1:
        parts.append((everyone, iter([slopes(wiring, case, of_nodes=of_nodes)])))
    else:
        groups = [(everyone, slice(0, 1))] if how == "inputs" else [(s, s) for s in nodes_of_layers(wiring)]
        for scored, moved in groups:
            parts.append((scored, _along(wiring, case, scored, moved, steps, of_nodes)))
    return torch.cat([_mean(points)[:, scored] for scored, points in parts], 1).double().cpu()


def _along(
    wiring: Wiring, case: Case, scored: slice, moved: slice, steps: int, of_nodes: bool
) -> Iterator[Tensor]:
    """Scores at points from the counterfactual outputs of the moved nodes towards the clean ones."""
    for k in range(steps):
        said = case.other[moved] + k / steps * case.drop[moved]
        yield slopes(wiring, case, moved.start, said, scored, of_nodes=of_nodes)


def _mean(points: Iterable[Tensor]) -> Tensor:
    """The mean of scores over points, of which one at a time is in memory."""
    count, total = 1, next(points := iter(points))
    for one in points:
        count += 1
        total += one
    return total / count
