"""Information flow routes: how much of what each part of a model reads comes from each part before it.

Ferrando & Voita 2024 (arXiv 2403.00824): one forward pass, no corrupt prompt and no gradient. The score says which
terms make up most of a sum, not which of them are used.
"""

from __future__ import annotations

from typing import Annotated

import networkx as nx
import torch
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._prompts.examples import Examples, batches_of, queries_of
from headwater.analyses._prompts.positions import Positions, columns_of
from headwater.analyses._streams.component_graph import Inputs, KeyValues, Wiring
from headwater.analyses._streams.redraws import MOST, Redraws, keep_examples
from headwater.analyses.circuits._graphs import graph_of
from headwater.lens.model import HookedModel


@analysis
def information_flow_routes(
    model: HookedModel,
    examples: Examples,
    queries: Annotated[Positions, 'positions that are looked at, e.g. -1; "all" for every one'] = "all",
    key_values: Annotated[KeyValues, "grouped queries: keys per query head or per KV head"] = "head",
    batch_size: BatchSize = 16,
) -> nx.DiGraph:
    """Every edge u → v with `score` = mean of `prox(a_u, x_v) / Σ_w prox(a_w, x_v)`.

    `prox(a, x) = max(0, ‖x‖₁ - ‖x - a‖₁)`. `a_u` is the output that node u adds to the residual stream, `x_v` the
    stream that v reads; biases are part of x alone. A position where every proximity is 0 counts as 0. Nodes and inputs
    are named as in `edge_attribution`. The mean is over the asked positions of each text, then over texts. `stability`
    and `by_example` are as in `edge_attribution`, over redraws of the texts.

    Question: How much of what each head and MLP reads comes from each one before it?
    Unit: share of the nearness to the sum, mean over positions and texts (0 to 1; over senders 1).
    Source: Ferrando & Voita 2024, arXiv:2403.00824; the formula compared with released code, the means are ours.
    Cost: one forward pass; memory positions · nodes · d_model.
    Not for: what is used of it: queries, keys and values of a layer read the same stream and get the same shares.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> graph = hw.analyses.information_flow_routes(model, text, queries=-1)
    >>> max(graph.in_edges("logits", data="score"), key=lambda edge: edge[2])[0]
    'mlp.3'
    """
    wiring = Wiring(model, key_values)
    tokens = queries_of(model, model.to_tokens(examples))
    columns = columns_of(queries, tokens.mask.cpu(), "queries")
    known = wiring.edges()
    scores, count = torch.zeros(known.shape, dtype=torch.float64), len(tokens.mask)
    kept = torch.zeros(count, int(known.sum())) if count * int(known.sum()) <= MOST else None
    batches = batches_of(model, examples, batch_size)
    for batch in batches:
        real = tokens.mask[batch.places].cpu()
        chosen = torch.zeros_like(real).scatter(1, columns[batch.places], True)
        shares = _shares(wiring, batch.ids, chosen[real].view(len(real), -1))
        scores += shares.sum(0)
        if kept is not None:
            kept[batch.places] = shares[:, known].float()
    graph = graph_of(wiring, scores / count, {"examples": count})
    if kept is not None:
        names = [(wiring.senders[u], wiring.receivers[v]) for u, v in known.nonzero().tolist()]
        keep_examples([graph.edges[name] for name in names], kept.numpy())
    graph.graph.update(Redraws.of(graph).told_of_parts())
    return graph


def _shares(wiring: Wiring, ids: Tensor, asked: Tensor) -> Tensor:
    """The mean over asked positions of each text, [text, node, input]."""
    found = torch.zeros(len(asked), len(wiring.senders), len(wiring.receivers), dtype=torch.float64)

    def reads(group: Inputs, x: Tensor, sent: list[Tensor]) -> None:
        parts = torch.stack(sent[: group.senders])
        near = (x.abs().sum(-1) - (x - parts).abs().sum(-1)).clamp_min(0).double().cpu()
        share = near / near.sum(0).clamp_min(torch.finfo(near.dtype).tiny)
        mean = (share * asked).sum(-1) / asked.sum(-1)
        found[:, : group.senders, group.span] = mean.T[..., None]

    with torch.no_grad():
        wiring.run(ids, reads)
    return found
