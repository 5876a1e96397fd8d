"""Attention distance against eager float64 maps, and hand-made heads whose distance is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.analyses.tokens.attention_distance import attention_distance


def dense_distance(maps: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Mean over real rows of Σ A|i-j| / Σ A, as [batch, layer, head]."""
    n = maps.shape[-1]
    far = (torch.arange(n)[:, None] - torch.arange(n)).abs().double()
    per_row = (maps * far).sum(-1) / maps.sum(-1)
    rows = [per_row[:, b][..., real.bool()].mean(-1) for b, real in enumerate(mask)]
    return torch.stack(rows).numpy()


def test_matches_dense_maps(pair, batch) -> None:
    ids, mask = batch
    expected = dense_distance(pair.maps(ids, mask), mask)
    record = pair.model.record(ids, attention_mask=mask)
    found = attention_distance(record)
    assert found.dims == ("layer", "head")
    np.testing.assert_allclose(found, expected.mean(0), atol=2e-5)
    np.testing.assert_allclose(attention_distance(record, per_example=True), expected, atol=2e-5)


def test_chosen_queries(pairs: Callable, batch) -> None:
    ids, mask = batch
    pair = pairs("llama")
    late = mask.bool() & (mask.flip(1).cumsum(1).flip(1) <= 2)
    expected = dense_distance(pair.maps(ids, mask), late)
    found = attention_distance(
        pair.model.record(ids, attention_mask=mask), queries=[-1, -2], per_example=True
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_uniform_pure_sink_and_identity(uniform: hw.HookedModel, pure_sink: hw.HookedModel) -> None:
    """Uniform causal rows look i/2 back, a pure sink i, the identity 0; means over 0..9."""
    ids = torch.randint(3, 61, (1, 10), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(attention_distance(uniform.record(ids)), 2.25, atol=1e-5)
    np.testing.assert_allclose(attention_distance(pure_sink.record(ids)), 4.5, atol=1e-4)
    with uniform.edit(hw.TowardIdentity(1.0)):
        np.testing.assert_allclose(attention_distance(uniform.record(ids)), 0, atol=1e-6)


def test_a_row_without_weight_is_left_out(uniform: hw.HookedModel) -> None:
    ids = torch.randint(3, 61, (1, 10), generator=torch.Generator().manual_seed(0))
    with uniform.edit(hw.Knockout(queries=[-1], keys="all", heads="0.1")):
        found = attention_distance(uniform.record(ids))
    np.testing.assert_allclose(found[0], [2.25, 2.0, 2.25, 2.25], atol=1e-5)


def test_one_token_looks_nowhere_else(pairs: Callable) -> None:
    assert float(attention_distance(pairs("gpt2").model.record(torch.tensor([[4]]))).max()) == 0


def test_trained_previous_token_head(minilm) -> None:
    """Head 0.2 of MiniLM looks one token back; [CLS] has none before it and looks elsewhere."""
    tokens = minilm.model.to_tokens("The cat sat on the mat near the open door .")
    found = attention_distance(minilm.model.record(tokens), queries=range(1, int(tokens.mask.sum())))
    assert found.values[0, 2] == pytest.approx(1.0, abs=0.01)
    expected = dense_distance(minilm.maps(tokens.ids, tokens.mask), tokens.mask)
    np.testing.assert_allclose(attention_distance(minilm.model.record(tokens)), expected[0], atol=1e-4)
