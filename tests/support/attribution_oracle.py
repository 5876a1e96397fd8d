"""Attributions written out as their formulas say, on the dense float64 maps of an eager transformers model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]  # logits [1, position, vocab] → [1]


def weights_and_slopes(twin: Any, ids: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """A and ∂score/∂A of one text, both [layer, head, query, key], from torch's own graph of eager attention."""
    found = twin(ids[None], output_attentions=True)
    slopes = torch.autograd.grad(score(found.logits).sum(), found.attentions)
    return torch.stack(found.attentions)[:, 0].detach(), torch.stack(slopes)[:, 0]


def input_slope(twin: Any, ids: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """Word embeddings of one text and the score's gradient at them, both [position, d_model]."""
    kept: list[Tensor] = []

    def catch(module: Any, args: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    handle = twin.get_input_embeddings().register_forward_hook(catch)
    try:
        logits = twin(ids[None]).logits
    finally:
        handle.remove()
    return kept[0][0].detach(), torch.autograd.grad(score(logits).sum(), kept[0])[0][0]


def predicted(logits: Tensor) -> Tensor:
    """The log-probability of what the model predicts last."""
    return logits[:, -1].log_softmax(-1).max(-1).values


def agree(found: np.ndarray, expected: Tensor, real: Tensor) -> None:
    """Float32 slopes of one text [position] against float64: 2e-3 of each, and the rounding of the largest."""
    error = 2e-5 * float(expected.abs().max()) + 1e-7
    np.testing.assert_allclose(found[real.numpy()], expected, rtol=2e-3, atol=error)
    assert np.isnan(found[~real.numpy()]).all()


def likely(position: int = -1, wrong: int | None = None) -> Score:
    """The largest logit of a position, less that of another token."""
    return lambda logits: (
        logits[:, position].max(-1).values - (0 if wrong is None else logits[:, position, wrong])
    )


def relevance_matrix(twin: Any, ids: Tensor, score: Score, normalise: bool = False) -> np.ndarray:
    """R [query, key] of one text, the product over the layers of 1 + the mean over heads of (A · slope)⁺."""
    weights, slopes = weights_and_slopes(twin, ids, score)
    eye = torch.eye(len(ids), dtype=torch.float64)
    found = eye
    for layer in (weights * slopes).relu().mean(1):
        mixed = layer + eye
        found = (mixed / mixed.sum(-1, keepdim=True) if normalise else mixed) @ found
    return found.detach().numpy()
