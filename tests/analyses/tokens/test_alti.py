"""ALTI against dense vectors in float64.

Mutations seen to fail: the output without biases in the distance, the 2-norm in the place of the 1-norm.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from limits import lower
from mixing_oracle import Layer, layers, layers_of_encoder, product
from torch import Tensor

import headwater as hw
from headwater.analyses.tokens.alti import alti
from headwater.lens.errors import AnalysisError


def shares(layer: Layer) -> Tensor:
    """ALTI of one layer, as the formula."""
    distance = (layer.whole[:, None] - layer.behind).abs().sum(-1)
    near = (layer.whole.abs().sum(-1, keepdim=True) - distance).clamp_min(0)
    near[near < 1e-12] = 0
    empty = near.sum(-1) == 0
    near[empty] = torch.eye(len(near), dtype=torch.float64)[empty]
    return near / near.sum(-1, keepdim=True)


def test_alti_matches_the_dense_product(pair, batch) -> None:
    ids, mask = batch
    found = alti(pair.model, pair.model.to_tokens(ids, mask), queries=[-1, 1])
    for row, real in enumerate(mask.bool()):
        maps = [shares(layer) for layer in layers(pair.twin, ids[row][real])]
        np.testing.assert_allclose(found.values[row][:, real.numpy()], product(maps)[[-1, 1]], atol=2e-4)
        np.testing.assert_allclose(np.nansum(found.values[row], -1), 1, atol=1e-6)


def test_alti_in_blocks_of_few_rows(pairs: Callable, monkeypatch) -> None:
    pair = pairs("gemma2")
    ids = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(4))
    lower(monkeypatch, "analyses.tokens.alti", ELEMENTS=1000)
    found = alti(pair.model, ids, queries="all")
    for row in range(2):
        expected = product([shares(layer) for layer in layers(pair.twin, ids[row])])
        np.testing.assert_allclose(found.values[row], expected, atol=2e-4)


def test_alti_of_attention_that_writes_nothing_leaves_tokens_in_place(uniform: hw.HookedModel) -> None:
    found = alti(uniform, torch.arange(3, 11)[None], queries="all")
    np.testing.assert_allclose(found.values[0], np.eye(8), atol=1e-9)


def test_alti_of_one_token_and_of_too_many(pairs: Callable, monkeypatch) -> None:
    model = pairs("bert").model
    np.testing.assert_allclose(alti(model, torch.tensor([[7]])).values, [[[1.0]]])
    lower(monkeypatch, "analyses.tokens.alti", LONGEST=5)
    with pytest.raises(AnalysisError, match="an example has 6 tokens and this takes 5 at most"):
        alti(model, torch.arange(3, 9)[None])


def test_alti_of_a_trained_encoder(minilm) -> None:
    """The trained weights, where norms and biases are far from 1 and 0."""
    tokens = minilm.model.to_tokens(["The cat sat on the mat .", "Attention drains into one token of many ."])
    found = alti(minilm.model, tokens, queries=[0])
    for row, real in enumerate(tokens.mask):
        dense = layers_of_encoder(minilm.twin, tokens.ids[row][real])
        expected = product([shares(layer) for layer in dense])[0]
        np.testing.assert_allclose(found.values[row, 0, real.numpy()], expected, atol=1e-4)
