"""GlobEnc against dense vectors in float64.

Mutations seen to fail: the second norm left out, its deviation taken from the first, the product in the wrong order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from mixing_oracle import layers, layers_of_encoder, product

import headwater as hw
from headwater.analyses.tokens.globenc import globenc


@pytest.mark.parametrize("normalise", [False, True])
def test_globenc_matches_the_dense_product(pair, batch, normalise: bool) -> None:
    ids, mask = batch
    tokens = pair.model.to_tokens(ids, mask)
    found = globenc(pair.model, tokens, queries=[-1, 1], normalise=normalise)
    for row, real in enumerate(mask.bool()):
        maps = [layer.encoded.norm(dim=-1) for layer in layers(pair.twin, ids[row][real])]
        if normalise:
            maps = [layer / layer.sum(-1, keepdim=True) for layer in maps]
        got = found.values[row][:, real.numpy()]
        np.testing.assert_allclose(got, product(maps)[[-1, 1]], rtol=2e-3, atol=1e-4)
        assert np.isnan(found.values[row][:, ~real.numpy()]).all()


def test_globenc_of_attention_that_writes_nothing_leaves_tokens_in_place(uniform: hw.HookedModel) -> None:
    found = globenc(uniform, torch.arange(3, 11)[None], queries="all", normalise=True)
    np.testing.assert_allclose(found.values[0], np.eye(8), atol=1e-9)


def test_globenc_of_one_token(pairs: Callable) -> None:
    found = globenc(pairs("bert").model, torch.tensor([[7]]), normalise=True)
    np.testing.assert_allclose(found.values, [[[1.0]]])


def test_globenc_of_a_trained_encoder(minilm) -> None:
    """The trained weights, where norms and biases are far from 1 and 0."""
    tokens = minilm.model.to_tokens(["The cat sat on the mat .", "Attention drains into one token of many ."])
    found = globenc(minilm.model, tokens, queries=[0])
    for row, real in enumerate(tokens.mask):
        dense = layers_of_encoder(minilm.twin, tokens.ids[row][real])
        expected = product([layer.encoded.norm(dim=-1) for layer in dense])[0]
        np.testing.assert_allclose(found.values[row, 0, real.numpy()], expected, rtol=1e-3)
