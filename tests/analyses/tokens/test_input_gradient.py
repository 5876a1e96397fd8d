"""Gradients at word embeddings against torch's own on the eager float64 model.

Mutations seen to fail: the 1-norm for the 2-norm, gradients of the wrong text of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attribution_oracle import agree, input_slope, predicted

import headwater as hw
from headwater.analyses.tokens.input_gradient import input_gradient
from headwater.lens.errors import AnalysisError


def test_input_gradient_matches_torch_on_the_eager_model(pair, batch) -> None:
    ids, mask = batch
    tokens = pair.model.to_tokens(ids, mask)
    norm = input_gradient(pair.model, tokens)
    shifted = not hasattr(pair.twin, "model")  # GPT-2 and BERT have layer norms alone
    if not shifted:
        total = input_gradient(pair.model, tokens, reduce="sum")
    else:
        with pytest.raises(AnalysisError, match="slopes sum to 0"):
            input_gradient(pair.model, tokens, reduce="sum")
    for row, real in enumerate(mask.bool()):
        _, slope = input_slope(pair.twin, ids[row][real], predicted)
        agree(norm.values[row], slope.norm(dim=-1), real)
        if not shifted:
            agree(total.values[row], slope.sum(-1).abs(), real)


def test_input_gradient_of_one_token(one_head: hw.HookedModel) -> None:
    assert input_gradient(one_head, torch.tensor([[5]])).shape == (1, 1)


def test_input_gradient_knows_sum_and_norm(pairs: Callable) -> None:
    model, ids = pairs("llama").model, torch.arange(5, 11)[None]
    with pytest.raises(AnalysisError, match="norm, sum"):
        input_gradient(model, ids, reduce="max")  # type: ignore[arg-type]
