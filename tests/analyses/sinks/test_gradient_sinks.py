"""Gradient sinks against gradients of dense float64 weights, to which the dense attention adds zeros.

Seen to fail: slopes of hidden pairs in the sums; the sum of slopes in the place of that of weights times slopes.
"""

from __future__ import annotations

from collections.abc import Callable

import dense_oracle
import numpy as np
import pytest
import torch
from ragged import padded

import headwater as hw
from headwater.analyses.sinks.gradient_sinks import gradient_sinks
from headwater.lens.errors import AnalysisError


@pytest.mark.parametrize("name", ["gpt2", "mistral", "bert"])
def test_gradients_of_dense_weights(pairs: Callable, name: str) -> None:
    """The derivative of the loss by a shift of the weights, which the dense attention adds with zeros."""
    pair = pairs(name)
    ids, mask = padded((9, 12))
    if name == "mistral":
        pair.twin.config.sliding_window = 5

    def loss(outputs: torch.Tensor, tokens) -> torch.Tensor:
        return outputs.double().log_softmax(-1)[:, -2:, 7].mean(-1)

    tokens = pair.model.to_tokens(ids, mask)
    found = gradient_sinks(pair.model, tokens, keys=[0, 1], loss=loss)
    twin = pair.twin
    for b, kept in enumerate(mask.bool()):
        text, shifts = ids[b][kept][None], {}

        def shifted(layer: int, weights: torch.Tensor, shifts: dict = shifts) -> torch.Tensor:
            shifts[layer] = torch.zeros_like(weights, requires_grad=True)
            return weights + shifts[layer]

        oracle = dense_oracle.Oracle(weights=shifted)
        twin.set_attn_implementation(dense_oracle.NAME)
        dense_oracle._running.append(oracle)
        out = twin(text, attention_mask=torch.ones_like(text)).logits
        dense_oracle._running.pop()
        twin.set_attn_implementation("eager")
        slopes = torch.autograd.grad(loss(out, text).sum(), [shifts[layer] for layer in range(3)])
        for layer, slope in enumerate(slopes):
            weights = oracle.maps[layer][0].detach() - shifts[layer][0].detach()
            slope = torch.where(weights > 0, slope[0], 0.0)
            columns = {
                "mass": slope.abs().sum(1), "by_weight": (weights * slope.abs()).sum(1),
                "signed": (weights * slope).sum(1), "queries": (weights > 0).double().sum(1),
            }  # fmt: skip
            for what in ("mass", "by_weight", "signed"):
                got = found[what][b, layer][:, kept.numpy()]
                np.testing.assert_allclose(got, columns[what], rtol=2e-3, atol=2e-7)
                assert columns[what].abs().max() > 1e-5
            for of in ("mass", "by_weight", "queries"):
                share = columns[of][:, :2].sum(-1) / columns[of].sum(-1)
                np.testing.assert_allclose(found.share.sel(of=of)[b, layer], share, rtol=2e-3)
    assert np.isnan(found.mass[0, ..., 9:]).all()


def test_the_default_loss_and_one_token(pairs: Callable) -> None:
    pair = pairs("llama")
    ids = torch.arange(3, 12)[None]
    found = gradient_sinks(pair.model, ids)
    spelled = gradient_sinks(
        pair.model, ids, loss=lambda out, t: torch.nn.functional.cross_entropy(out[0, :-1], ids[0, 1:])[None]
    )
    np.testing.assert_allclose(found.mass, spelled.mass, rtol=1e-4, atol=1e-8)
    one = gradient_sinks(pair.model, ids[:, :1], loss=lambda out, t: out[:, -1, 5])
    np.testing.assert_allclose(one.share, 1)


def test_a_position_that_is_missing(one_head: hw.HookedModel) -> None:
    with pytest.raises(AnalysisError, match="keys holds 4, but batch row 0 has 2 tokens"):
        gradient_sinks(one_head, torch.tensor([[5, 6]]), keys=4)
