"""ACDC on a model whose edges are known, and against its walk by hand.

Mutations seen to fail: the cost compared with the clean run instead of the run so far, and the same of whole inputs.
"""

from __future__ import annotations

import copy

import edge_oracle
import planted_models
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses.circuits._graphs import edges_of
from headwater.lens.errors import HeadwaterError
from headwater.lens.loading import zoo


def test_acdc_finds_the_planted_circuit() -> None:
    """Precision and recall 1.0 with means on the edges that are out, by either cost."""
    planted = planted_models.induction(vocabulary=16, positions=12)
    model = hw.load(planted.model)
    first, other, start = torch.tensor([3, 5, 7, 9]), torch.tensor([2, 4, 6, 8]), torch.tensor([0])
    given = [(torch.cat([start, first, first[:2]]), torch.cat([start, other, first[:2]]))]
    asked = {"answer": [7], "wrong": [3], "ablation": "mean"}
    found = analyses.acdc(model, given, tau=1.0, metric="measure", **asked)
    assert set(edges_of(found)) == planted.edges
    assert all(found.edges[edge]["score"] >= 1.0 for edge in planted.edges)
    assert set(edges_of(analyses.acdc(model, given, tau=1.0, **asked))) == planted.edges


@pytest.mark.parametrize("inputs", [False, True])
def test_acdc_is_the_walk_by_hand(inputs: bool) -> None:
    """Removed edge by removed edge on the dense float64 run, with KL; with inputs, whole inputs of heads first."""
    plain = zoo.build("gpt_neox")
    twin = copy.deepcopy(plain).double()
    model = hw.load(plain)
    model.hf.double()
    ids = torch.randint(3, 90, (2, 1, 4), generator=torch.Generator().manual_seed(1))
    tau = 0.003

    def next_tokens(changed: set) -> torch.Tensor:
        with torch.no_grad():
            return edge_oracle.run(twin, ids[0], other, changed).logits[0, -1].log_softmax(-1)

    with torch.no_grad():
        other = edge_oracle.run(twin, ids[1]).nodes
        told = edge_oracle.run(twin, ids[0])
    full, out, alive, before = next_tokens(set()), set(), {"logits"}, 0.0
    inside: dict[str, float] = {}
    # inputs in the order of a run: all q of a layer, then all k, then all v
    kinds = {"q": 0, "k": 1, "v": 2}
    order = sorted(
        told.leaves,
        key=lambda name: (
            (9, 0, 0)
            if name == "logits"
            else (int(name[4:]), 5, 0)
            if name[0] == "m"
            else (int(name[0]), kinds[name[-1]], int(name[2]))
        ),
    )
    for receiver in reversed(order):
        owner = receiver if receiver[0] in "ml" else receiver[:-2]
        into = [(u, v) for u, v in told.edges if v == receiver]
        if inputs and owner in alive and receiver[0] not in "ml":
            now = next_tokens(out | set(into))
            cost = float((full.exp() * (full - now)).sum())
            if cost - before < tau:
                out, before = out | set(into), cost
                continue
            inside[receiver] = cost - before
        for sender in reversed([u for u, _ in into]):
            if owner not in alive:
                out.add((sender, receiver))
                continue
            now = next_tokens(out | {(sender, receiver)})
            cost = float((full.exp() * (full - now)).sum())
            if cost - before < tau:
                out.add((sender, receiver))
                before = cost
            else:
                alive.add(sender)
    kept = {edge for edge in told.edges if edge not in out}
    assert 5 < len(kept) < len(told.edges) - 5
    graph = analyses.acdc(model, [(ids[0, 0], ids[1, 0])], tau=tau, inputs=inputs)
    found = set(edges_of(graph))
    costs = {u: cost for u, _, cost in graph.edges(data="cost") if cost is not None}
    assert bool(costs) == inputs
    assert costs == pytest.approx({receiver: inside[receiver] for receiver in costs}, abs=1e-9)
    assert found == _without_dead_ends(kept)


def _without_dead_ends(kept: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges whose sender hears something and whose reader is heard."""
    owner = {v: v if v[0] in "ml" else v[:-2] for _, v in kept}
    while True:
        heard, hears = {u for u, _ in kept} | {"logits"}, {owner[v] for _, v in kept} | {"embed"}
        less = {(u, v) for u, v in kept if u in hears and owner[v] in heard}
        if less == kept:
            return kept
        kept = less


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"tau": -1.0}, "tau=-1.0 is outside its limits"), ({"metric": "up"}, "metric='up' is unknown")],
)
def test_acdc_refuses_what_makes_no_sense(asked, message: str) -> None:
    model = hw.load(zoo.build("gpt2"))
    with pytest.raises(HeadwaterError, match=message):
        analyses.acdc(model, [(torch.tensor([3, 4]), torch.tensor([3, 5]))], **asked)
