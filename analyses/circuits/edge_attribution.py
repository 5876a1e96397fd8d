"""Edge attribution: how much each connection between two parts of a model carries of what tells two prompts apart.

EAP (Syed, Rager & Conmy 2023, arXiv 2310.10348) and EAP-IG (Hanna, Pezzelle & Belinkov 2024, arXiv 2403.17806), with
the exact effect of every edge beside them. Grouped queries, parallel blocks and norms behind the heads are handled. A
gradient is a slope: where attention saturates it is near 0 on edges that matter, and the exact effect is not.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

import networkx as nx
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.bootstrap import LEVEL, bounds, redraws
from headwater.analyses._measures.measure import AnswerSetting, PositionSetting, WrongSetting
from headwater.analyses._measures.pair_scores import Asked, PairMeasure
from headwater.analyses._prompts.pairs import PairExamples, pairs_of
from headwater.analyses._streams.component_graph import KeyValues, Wiring
from headwater.analyses.circuits._counterfactuals import (
    Case,
    cases_of,
    changed,
    nodes_of_layers,
    slopes,
)
from headwater.analyses.circuits._graphs import graph_of, select_circuit as select_circuit
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

How = Literal["inputs", "activations", "clean_corrupt", "exact"]
MOST_EDGES = 20_000  # of the exact method, where each is a forward pass
ROWS = 64  # that run together
TOGETHER = 4096  # edges whose means are redrawn at once, for memory


@analysis
def edge_attribution(
    model: HookedModel,
    pairs: PairExamples,
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
    seed: Annotated[int, "seed of the resampling", Bounds(0)] = 0,
    per_pair: Annotated[bool, "keep the score of every pair too"] = False,
    batch_size: Annotated[int, "pairs of equal length that run together", Bounds(1)] = 16,
) -> nx.DiGraph:
    """Every edge u → v with `score` = mean over pairs of `Σ_{position,d} (a_u(clean) - a_u(corrupt)) · ∂m/∂in_v`.

    `a_u` is what node u adds to the residual stream, `in_v` the stream as input v reads it, before its norm, which is
    differentiated. The score is the drop of m when the edge is changed, to first order: positive edges help.
    `steps=1`: the gradient on the clean prompt (EAP). `how="inputs"`: its mean at the embeddings
    `e_corrupt + k/steps·(e_clean - e_corrupt)`, k = 0 … steps - 1 (EAP-IG). "activations": the same with what u
    and the nodes beside it say in the place of the embeddings. "clean_corrupt": the mean of both ends. "exact": the
    drop itself, `m(clean) - m(clean with the edge changed)`. `level="node"` scores nodes, with what they say to all.

    `pairs` are (clean, corrupt) texts or ids of equal length, or examples of a prompt set. m is the logit of
    `answer` less that of `wrong` at `position` (of the examples, or what the model predicts on each prompt), or
    `measure(logits) → [pair]`. Nodes "embed", "5.1", "mlp.3", "logits"; inputs "5.1.q", or "5.kv0.k" where
    `key_values="kv"`; edges of kind "inside" join inputs to heads. AnalysisError for a model whose stream is not the
    sum of its nodes.

    From two pairs on, `low` and `high` of an edge (or node) bound 95 % of the means of redrawn pairs, drawn alike for
    all edges; they say nothing of the slope's own error. `per_pair` adds `scores`, one per pair, as JSON.
    Unit: that of the measure. Source: the authors' code, checked; averaging of "activations" over layers, from memory.

    Question: Which connections between heads and MLPs carry what makes the difference?
    Unit: drop of the measure when the edge is changed, mean over pairs (positive: the edge helps).
    Source: Syed et al. 2023, arXiv:2310.10348; Hanna et al. 2024, arXiv:2403.17806.
    Cost: two passes and `steps` forward and backward passes per batch; exact: a pass per edge, many at once.
    Not for: edges that back each other up, of which each looks needless; saturated attention (gradients alone).
    """
    wiring = Wiring(model, key_values)
    asked = Asked(measure, answer, wrong, position)
    cases = cases_of(wiring, pairs_of(model, pairs, batch_size), asked, ablation)
    if how == "exact":
        scores = _exact(wiring, cases, level)
    else:
        scores = torch.zeros(len(pairs), *_shape(wiring, level), dtype=torch.float64)
        for case in tqdm(cases, desc="edge attribution", unit="batch", disable=None):
            scores[case.pairs.places] = _scored(wiring, case, how, steps, level)
    attrs = {"pairs": len(pairs), "interval": LEVEL, **asked.settings}
    mean = scores.mean(0)
    graph = graph_of(wiring, None, attrs, mean) if level == "node" else graph_of(wiring, mean, attrs)
    _spread(wiring, graph, scores.numpy(), draws, seed, per_pair)
    return graph


def _shape(wiring: Wiring, level: str) -> tuple[int, ...]:
    return (len(wiring.senders),) if level == "node" else tuple(wiring.edges().shape)


def _spread(
    wiring: Wiring, graph: nx.DiGraph, scores: np.ndarray, draws: int, seed: int, per_pair: bool
) -> None:  # fmt: skip
    """Put the interval of each score [pair, node] or [pair, node, input] on the graph, and the scores if asked for."""
    count = len(scores)
    if scores.ndim == 2:
        places: list[tuple[int, ...]] = [(n,) for n in range(scores.shape[1])]
        told = [graph.nodes[name] for name in wiring.senders]
    else:
        places = [(int(u), int(v)) for u, v in wiring.edges().nonzero()]
        told = [graph.edges[wiring.senders[u], wiring.receivers[v]] for u, v in places]
    times = [np.bincount(pick, minlength=count) for pick in redraws(count, draws, seed)]
    weights = np.stack(times) / count  # [draw, pair]
    for start in range(0, len(places), TOGETHER):
        some = places[start : start + TOGETHER]
        each = np.stack([scores[(slice(None), *place)] for place in some], 1)  # [pair, edge]
        low, high = bounds(weights @ each)
        for n, about in enumerate(told[start : start + TOGETHER]):
            if count > 1:
                about.update(low=float(low[n]), high=float(high[n]))
            if per_pair:
                about["scores"] = json.dumps(each[:, n].tolist())


def _scored(wiring: Wiring, case: Case, how: How, steps: int, level: str) -> Tensor:
    """Each edge's score [pair, node, input], or each node's [pair, node]."""
    parts: list[tuple[slice, list[tuple[Tensor, Tensor]]]] = []
    everyone = slice(0, len(wiring.senders))
    if how == "clean_corrupt":
        parts.append((everyone, [slopes(wiring, case), slopes(wiring, case, 0, case.other[:1])]))
    elif steps == 1:
        parts.append((everyone, [slopes(wiring, case)]))
    else:
        groups = [(everyone, slice(0, 1))] if how == "inputs" else [(s, s) for s in nodes_of_layers(wiring)]
        for scored, moved in groups:
            points = (case.other[moved] + k / steps * case.drop[moved] for k in range(steps))
            parts.append((scored, [slopes(wiring, case, moved.start, said) for said in points]))
    found = []
    for scored, points in parts:
        at_inputs, at_nodes = (torch.stack(each).mean(0) for each in zip(*points, strict=True))
        drop = case.drop[scored]
        if level == "node":
            found.append((drop * at_nodes[scored]).sum((2, 3)).mT)
        else:
            found.append(torch.einsum("ubsd,brsd->bur", drop, at_inputs))
    scores = torch.cat(found, 1).double().cpu()
    return scores * wiring.edges() if level == "edge" else scores


def _exact(wiring: Wiring, cases: list[Case], level: str) -> Tensor:
    known = wiring.edges()
    edges = known.T.nonzero().flip(1)  # those into one input run together
    changes = len(wiring.senders) if level == "node" else len(edges)
    if changes > MOST_EDGES:
        raise AnalysisError(
            f'{wiring.model.name} has {changes} edges and how="exact" runs each; it takes {MOST_EDGES} at most, so use '
            '"inputs"'
        )
    count = sum(len(case.pairs.places) for case in cases)
    scores = torch.zeros(count, *_shape(wiring, level), dtype=torch.float64)
    for case in cases:
        copies = max(1, ROWS // len(case.pairs.clean))
        for start in tqdm(range(0, changes, copies), desc="edges", unit="run", disable=None):
            mine = range(start, min(start + copies, changes))
            masks = torch.zeros(len(mine), *known.shape)
            for copy, n in enumerate(mine):
                if level == "node":
                    masks[copy, n] = known[n].float()
                else:
                    masks[copy, edges[n, 0], edges[n, 1]] = 1.0
            drops = case.told.clean - changed(wiring, case, masks).double().cpu()  # [copy, pair]
            for copy, n in enumerate(mine):
                place = (n,) if level == "node" else tuple(edges[n].tolist())
                scores[(case.pairs.places, *place)] = drops[copy]
    return scores
