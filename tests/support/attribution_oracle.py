"""Attributions written out as their formulas say, on the dense float64 maps of an eager transformers model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
