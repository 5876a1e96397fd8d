"""Formulas of attributions on a transformers model with eager attention, by its own inputs_embeds and attentions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Score = Callable[[Any], Tensor]  # the model's output → one number per row


def embedded(hf: Any, ids: Tensor) -> Tensor:
    return hf.get_input_embeddings()(ids).detach()


def slope(hf: Any, e: Tensor, score: Score, **more: Any) -> Tensor:
    """∂s/∂e [row, position, d]."""
    leaf = e.clone().requires_grad_()
    return torch.autograd.grad(score(hf(inputs_embeds=leaf, **more)).sum(), leaf)[0]


def integrated(hf: Any, start: Tensor, end: Tensor, score: Score, points: int, **more: Any) -> Tensor:
    """Σ_d (e - b) ∫ ∂s/∂e along the line, by the midpoint rule: [row, position]."""
    total = torch.zeros_like(end)
    for n in range(points):
        total += slope(hf, start + (n + 0.5) / points * (end - start), score, **more) / points
    return (total * (end - start)).sum(-1)


def relevance(hf: Any, score: Score, rollout: bool = False, **given: Any) -> Tensor:
    """R [row, query, key] of Chefer et al. from the dense attentions and their gradients."""
    out = hf(**given, output_attentions=True)
    slopes = torch.autograd.grad(score(out).sum(), out.attentions)
    length = out.attentions[0].shape[-1]
    found = torch.eye(length, dtype=out.attentions[0].dtype).expand(len(out.attentions[0]), -1, -1)
    for weights, grad in zip(out.attentions, slopes, strict=True):
        step = (weights * grad).clamp_min(0).mean(1) + torch.eye(length, dtype=weights.dtype)
        found = (step / step.sum(-1, keepdim=True) if rollout else step) @ found
    return found.detach()
