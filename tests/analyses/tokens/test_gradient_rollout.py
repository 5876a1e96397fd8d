"""Gradient rollout against torch's own gradients of eager float64 attention.

Mutations seen to fail: layers in the wrong order, the identity left out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from attribution_oracle import likely, relevance_matrix, weights_and_slopes

from headwater.analyses.tokens.gradient_rollout import gradient_rollout
from headwater.lens.errors import AnalysisError


def test_gradient_rollout_matches_the_graph_of_eager_attention(pair, batch) -> None:
    ids, mask = batch
    found = gradient_rollout(pair.model, pair.model.to_tokens(ids, mask), queries=[-1, 1])
    for row, real in enumerate(mask.bool()):
        expected = relevance_matrix(pair.twin, ids[row][real], likely(), normalise=True)
        got = found.values[row][:, real.numpy()]
        np.testing.assert_allclose(got, expected[[-1, 1]], rtol=2e-4, atol=2e-5)
        assert np.isnan(found.values[row][:, ~real.numpy()]).all()
        np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)


def test_upper_layers_alone(pairs: Callable) -> None:
    pair = pairs("llama")
    ids = torch.arange(5, 14)
    weights, slopes = weights_and_slopes(pair.twin, ids, likely())
    eye = torch.eye(9, dtype=torch.float64)
    layer = (weights * slopes).relu().mean(1)[2] + eye
    found = gradient_rollout(pair.model, ids[None], first_layer=2)
    np.testing.assert_allclose(found.values[0, 0], (layer / layer.sum(-1, keepdim=True))[-1], atol=2e-5)
    with pytest.raises(AnalysisError, match="first_layer=7 has no attention"):
        gradient_rollout(pair.model, ids[None], first_layer=7)


def test_gradient_rollout_of_one_token(pairs: Callable) -> None:
    alone = gradient_rollout(pairs("llama").model, torch.tensor([[7]]))
    np.testing.assert_allclose(alone.values, [[[1.0]]])
