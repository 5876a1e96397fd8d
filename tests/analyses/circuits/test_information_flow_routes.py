"""Information flow routes against their formula on dense float64 runs.

Mutation seen to fail: the nearness without its absolute values.
"""

from __future__ import annotations

import copy

import edge_oracle
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses.circuits._graphs import edges_of
from headwater.lens.loading import zoo


@pytest.mark.parametrize("queries", ["all", [-1, 2]])
def test_routes_are_the_formula(queries) -> None:
    plain = zoo.build("llama")
    twin = copy.deepcopy(plain).double()
    model = hw.load(plain)
    model.hf.double()
    texts = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        nodes = edge_oracle.run(twin, texts).nodes
    graph = analyses.information_flow_routes(model, texts, queries=queries)
    for receiver in ("0.1.k", "mlp.0", "1.3.v", "logits"):
        senders = [u for u, v in edges_of(graph) if v == receiver]
        total = sum(nodes[u] for u in senders)  # Llama has no biases
        near = {u: (total.abs().sum(-1) - (total - nodes[u]).abs().sum(-1)).clamp(min=0) for u in senders}
        every = sum(near.values())
        columns = list(range(5)) if queries == "all" else queries
        for sender in senders:
            expected = (near[sender] / every)[:, columns].mean()
            assert graph.edges[sender, receiver]["score"] == pytest.approx(float(expected), abs=1e-9)
        assert sum(graph.edges[u, receiver]["score"] for u in senders) == pytest.approx(1)


def test_texts_of_unequal_length_count_the_same() -> None:
    model = hw.load(zoo.build("gpt2"))
    long, short = torch.tensor([5, 6, 7, 8]), torch.tensor([9, 4])
    padded = torch.stack([long, torch.nn.functional.pad(short, (0, 2))])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    both = analyses.information_flow_routes(model, model.to_tokens(padded, mask))  # type: ignore[arg-type]
    parts = [analyses.information_flow_routes(model, ids[None]) for ids in (long, short)]
    for edge in edges_of(both):
        mean = sum(part.edges[edge]["score"] for part in parts) / 2
        assert both.edges[edge]["score"] == pytest.approx(mean, abs=1e-6)
