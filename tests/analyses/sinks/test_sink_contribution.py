"""What sinks carry, against dense maps and values, and a run of the eager twin with the values taken out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dense_oracle import Oracle, run

import headwater as hw
from headwater.analyses.sinks._control_keys import control_keys
from headwater.analyses.sinks.sink_contribution import sink_contribution
from headwater.lens.errors import AnalysisError


def test_controls_are_as_many_other_keys() -> None:
    sinks = torch.rand(3, 2, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    every = torch.ones(3, 9, dtype=torch.bool)
    drawn = control_keys(sinks, every, [0, 1, 2], seed=0, draw=0)
    assert not (drawn & sinks).any()
    expected = torch.minimum(sinks.sum(-1), (~sinks).sum(-1))
    assert drawn.sum(-1).equal(expected)
    assert drawn[1:].equal(control_keys(sinks[1:], every[1:], [1, 2], seed=0, draw=0))  # whatever the batch
    assert not drawn.equal(control_keys(sinks, every, [0, 1, 2], seed=0, draw=1))
    some = every & (torch.arange(9) < 4)
    among = control_keys(sinks, some, [0, 1, 2], seed=0, draw=0)
    assert among.any()
    assert not (among & ~some[:, None, None]).any()
    full = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    assert not control_keys(full, every[:1, :4], [0], 0, 0).any()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_shares_and_changes_are_the_dense_ones(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    ids = torch.randint(3, 61, (2, 8), generator=torch.Generator().manual_seed(0))
    found = sink_contribution(pair.model, ids, keys=[0, 3], controls=1)
    maps = pair.maps(ids).transpose(0, 1)
    record = pair.model.record(ids, keep=("qkv",))
    twin = copy.deepcopy(pair.twin)
    flags = torch.zeros(2, 3, 4, 8, dtype=torch.bool)
    flags[..., [0, 3]] = True
    for of, picked in (
        ("sinks", flags),
        ("control", control_keys(flags, torch.ones_like(flags[:, 0, 0]), [0, 1], 0, 0)),
    ):
        for b in range(2):
            seen = torch.ones(8, 8).tril().bool()
            asked = (seen & picked[b, 0, 0]).any(-1) & (seen & ~picked[b, 0, 0]).any(-1)
            for layer, h in np.ndindex(3, 4):
                value = record.values[layer][b].double()
                value = value[h // (4 // len(value))]
                dense = maps[b, layer, h]
                part = (dense * picked[b, layer, h]) @ value
                ratio = (part.norm(dim=-1) / (dense @ value).norm(dim=-1))[asked].mean()
                np.testing.assert_allclose(found.share.sel(of=of)[b, layer, h], ratio, rtol=1e-4)

            def without(
                layer: int, weights: torch.Tensor, gone: torch.Tensor = picked[b, 0, 0]
            ) -> torch.Tensor:
                return weights * ~gone

            with torch.no_grad():
                before = pair.twin(ids[b : b + 1]).logits
            after = run(twin, ids[b : b + 1], None, Oracle(weights=without))
            p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1).mean()
            np.testing.assert_allclose(found.kl.sel(of=of)[b], kl, rtol=2e-3)
            moved = (after - before).double()
            moved = (moved - moved.mean(-1, keepdim=True)).square().mean(-1).sqrt().mean()
            np.testing.assert_allclose(found.logit_change.sel(of=of)[b], moved, rtol=2e-3)
    np.testing.assert_allclose(found["mean"].sel(measure="kl"), found.kl.mean("batch"))
    beyond = (found.kl.sel(of="sinks") - found.kl.sel(of="control")).mean()
    np.testing.assert_allclose(found.beyond.sel(measure="kl", bound="mean"), beyond)


def test_a_pure_sink_is_all_of_the_output_and_changes_nothing(pure_sink: hw.HookedModel) -> None:
    ids = torch.arange(3, 15)[None]
    found = sink_contribution(pure_sink, ids, controls=2)
    np.testing.assert_allclose(found.share.sel(of="sinks"), 1.0, rtol=1e-5)
    np.testing.assert_allclose(found.share.sel(of="control"), 0.0, atol=1e-5)
    np.testing.assert_allclose(found.kl, 0.0, atol=1e-9)  # its output projection is zero


def test_rules_one_token_and_refusals(pairs: Callable, one_head: hw.HookedModel) -> None:
    ids = torch.randint(3, 61, (2, 8), generator=torch.Generator().manual_seed(0))
    found = sink_contribution(
        pairs("gpt2").model, ids, rule="share", threshold=0.25, controls=1, batch_size=1
    )
    assert np.isfinite(found.kl).all()
    assert (found.kl.sel(of="sinks") > 0).all()
    alone = sink_contribution(one_head, torch.tensor([[5]]), controls=1)
    assert np.isnan(alone.share).all()
    np.testing.assert_allclose(alone.kl.sel(of="control"), 0.0, atol=1e-12)
    with pytest.raises(AnalysisError, match="controls=0"):
        sink_contribution(one_head, ids, controls=0)
