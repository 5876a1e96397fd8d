"""Intervals and scores per pair of edges: every pair by itself, and the bootstrap written out.

Mutations seen to fail: pairs of another length put in the wrong places, high and low exchanged.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from limits import lower

import headwater as hw
from headwater import analyses
from headwater.analyses.circuits._graph_files import read_circuit, write_circuit
from headwater.lens.loading import zoo


def measure(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 7] - logits[:, -1, 11]


@pytest.fixture(scope="module")
def model() -> hw.HookedModel:
    return hw.load(zoo.build("gpt2").double())


def pairs() -> list:
    """Five pairs of two lengths, the lengths mixed."""
    generator = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(3, 90, (2, n), generator=generator)) for n in (6, 4, 6, 5, 4)]


@pytest.mark.parametrize(
    ("how", "level"), [("inputs", "edge"), ("inputs", "node"), ("exact", "node"), ("clean_corrupt", "edge")]
)
def test_each_pair_by_itself_and_the_bootstrap(model, how, level, tmp_path, monkeypatch) -> None:

    lower(monkeypatch, "analyses.circuits.edge_attribution", TOGETHER=7)
    given = {"measure": measure, "how": how, "level": level, "steps": 2}
    found = analyses.edge_attribution(model, pairs(), **given, per_pair=True, draws=200, seed=3)
    alone = [analyses.edge_attribution(model, [pair], **given) for pair in pairs()]
    picks = np.random.default_rng(3).integers(5, size=(200, 5))
    items = found.edges if level == "edge" else found.nodes
    told = [about for about in items.values() if "score" in about]
    every = np.array([json.loads(about["scores"]) for about in told])  # [edge or node, pair]
    for part, share in json.loads(found.graph["stability"]).items():
        number = max(1, int(float(part) * len(every)))
        own, *others = (
            set(sorted(range(len(every)), key=lambda n, mean=mean: -abs(mean[n]))[:number])
            for mean in (every.mean(1), *(every[:, pick].mean(1) for pick in picks[:100]))
        )
        expected = np.mean([len(own & each) / len(own | each) for each in others])
        assert share == pytest.approx(expected, abs=0.02)  # scores that are equal but for rounding
    assert alone[0].graph["stability"] == "unknown: one pair, so there is nothing to redraw"
    checked = 0
    for name, about in items.items():
        if "score" not in about:
            assert "low" not in about
            continue
        each = np.array(json.loads(about["scores"]))
        single = [(graph.edges if level == "edge" else graph.nodes)[name] for graph in alone]
        np.testing.assert_allclose(each, [one["score"] for one in single], atol=1e-9)
        assert "low" not in single[0]
        assert about["score"] == pytest.approx(each.mean(), abs=1e-12)
        means = each[picks].mean(1)
        assert (about["low"], about["high"]) == pytest.approx(
            tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12
        )
        checked += 1
    assert checked > 8
    again = read_circuit(write_circuit(found, tmp_path / "a.graphml"))
    assert dict(again.nodes(data=True)) == dict(found.nodes(data=True))
    assert (found.graph["draws"], found.graph["seed"], found.graph["interval"]) == (200, 3, 0.95)
