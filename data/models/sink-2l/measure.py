"""Measurements of a sink model by dense maps: accuracy after triggers, and sink rates after Gu et al. 2025."""

from __future__ import annotations

import torch
from language import FIRST_WORD, random_tokens, repeated_token, texts
from torch import Tensor

LENGTH = 64
EPSILON = 0.3


@torch.no_grad()
def maps(model, rows: Tensor) -> Tensor:
    """Weights [layer, text, head, query, key], as they multiply the values."""
    return torch.stack(model(rows, use_cache=False, output_attentions=True).attentions).double()


def shares(weights: Tensor, proxy: bool) -> Tensor:
    """α of each key, [layer, text, head, key]: its mean weight over the queries that see it.

    `proxy` divides each row by its sum of absolute weights first, for maps whose rows do not sum to 1.
    """
    if proxy:
        weights = weights.abs() / (weights.abs().sum(-1, keepdim=True) + 1e-8)
    seen = torch.arange(weights.shape[-1], 0, -1)
    return weights.sum(-2) / seen


def sink_figures(model, rows: Tensor) -> dict[str, float]:
    weights = maps(model, rows)
    plain, proxy = (shares(weights, p)[..., 0] for p in (False, True))
    return {
        "sink_rate": (plain > EPSILON).double().mean().item(),
        "sink_rate_of_shares": (proxy > EPSILON).double().mean().item(),
        "first_share": plain.mean().item(),
        "first_share_of_shares": proxy.mean().item(),
        "largest_head": proxy.mean(1).max().item(),
        "row_mass": weights.sum(-1).mean().item(),
    }


@torch.no_grad()
def everything(model, draws: int, seed: str) -> dict:
    """All figures of metrics.json: the loss, the words after triggers, and sinks on three kinds of text."""
    rows = texts(draws, LENGTH + 1, f"held-out {seed}")
    logits = model(rows[:, :-1], use_cache=False).logits
    wanted = rows[:, 1:]
    trigger = (rows[:, :-1] >= 2) & (rows[:, :-1] < FIRST_WORD)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    return {
        "loss": loss.item(),
        "after_triggers_right": (logits.argmax(-1) == wanted)[trigger].double().mean().item(),
        "text": sink_figures(model, rows[:, :LENGTH]),
        "random_tokens": sink_figures(model, random_tokens(draws, LENGTH, f"random {seed}")),
        "repeated_token": sink_figures(model, repeated_token(draws, LENGTH, f"repeated {seed}")),
    }
