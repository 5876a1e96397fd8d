"""Learned gates on a loss whose best gates are known.

Mutation seen to fail: the price taken off instead of added.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError

IDS = torch.tensor([[3, 9, 4], [5, 7, 8]])


@pytest.mark.parametrize("kind", ["hard_concrete", "sigmoid"])
def test_only_the_head_that_pays_stays_open(pairs, kind: str) -> None:
    """The loss falls with the length of one head's output, which no other head of its layer changes."""
    model = pairs("gpt2").model
    seen: list[Tensor] = []
    watched = model.hf.transformer.h[0].attn.c_proj
    handle = watched.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        z = seen[-1].unflatten(-1, (4, -1))[:, -1, 2]
        return -10 * z.norm(dim=-1) + 0 * logits[:, -1, 0]

    before = [p.clone() for p in model.hf.parameters()]
    found = analyses.learn_gates(model, IDS, loss=loss, kind=kind, penalty=1.0, steps=60, rate=0.5)
    handle.remove()
    gates = found.gate.values.copy()
    assert gates[0, 2] > 0.95
    gates[0, 2] = 0
    assert gates.max() < 0.1
    if kind == "hard_concrete":
        assert (gates == 0).all()
    assert float(found.loss_gated) == pytest.approx(float(found.loss_whole), rel=0.05)
    assert found.training_loss.shape == (60,)
    assert float(found.expected_open[-1]) < 0.25 < float(found.expected_open[0])
    for parameter, old in zip(model.hf.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)


def test_the_first_step_in_closed_form(pairs) -> None:
    """At a = 2: σ(2 - β ln(0.1/1.1)) are open, and a step of Adam moves every parameter by the rate."""
    model = pairs("llama").model
    found = analyses.learn_gates(model, IDS, penalty=100.0, steps=1, rate=0.5)
    start = 1 / (1 + math.exp(-(2 - 2 / 3 * math.log(0.1 / 1.1))))
    assert float(found.expected_open[0]) == pytest.approx(start, rel=1e-6)
    after = 1 / (1 + math.exp(-1.5))
    np.testing.assert_allclose(found.gate, after * 1.2 - 0.1, rtol=1e-4)


def test_open_heads_are_held_to_those_of_other_seeds(pairs) -> None:
    model = pairs("llama").model
    ids = torch.randint(3, 61, (3, 8), generator=torch.Generator().manual_seed(0))
    asked = {"steps": 12, "rate": 0.5, "penalty": 0.3, "batch_size": 1}
    found = analyses.learn_gates(model, ids, **asked, seed=2, seeds=3)
    each = [analyses.learn_gates(model, ids, **asked, seed=seed) for seed in (2, 3, 4)]
    np.testing.assert_array_equal(found.gate, each[0].gate)
    own, *others = ({*map(tuple, np.argwhere(one.gate.values > 0.5))} for one in each)
    shares = [len(own & other) / len(own | other) for other in others]
    assert found.attrs["stability"] == pytest.approx(np.mean(shares))
    assert 0 < found.attrs["stability"] < 1
    assert found.attrs["stability_over"] == "2 other seeds"
    assert each[0].attrs["stability"] == "unknown: one seed; seeds=5 trains from others too"


def test_seeds_and_refusals(pairs) -> None:
    model = pairs("llama").model
    one, again, other = (analyses.learn_gates(model, IDS, steps=3, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.gate, again.gate)
    assert not np.array_equal(one.training_loss, other.training_loss)
    with pytest.raises(AnalysisError, match="kind='l0'"):
        analyses.learn_gates(model, IDS, kind="l0")  # type: ignore[arg-type]


def test_free_heads_stay_open(uniform: hw.HookedModel) -> None:
    """Without a price, and with a loss that no head moves, nothing is learned."""
    found = analyses.learn_gates(uniform, IDS, penalty=0.0, steps=3, kind="sigmoid")
    np.testing.assert_allclose(found.gate, 1 / (1 + math.exp(-2)), rtol=1e-5)
