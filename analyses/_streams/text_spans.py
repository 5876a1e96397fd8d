"""TextSpan: the texts whose directions hold most of what a head writes, chosen one by one.

Gandelsman, Efros & Steinhardt 2024, algorithm 1, as released: texts are projected on the span of the head's first
right singular vectors, and after each choice both what the head writes and all texts lose its direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-12  # share of the squares that a variance made of rounding has in float32 sums
NOTHING = 1e-9  # share of the variance, or of a text's length, below which there is none left


@dataclass(frozen=True, eq=False)
class Span:
    """`chosen` texts in their order, the `spread` [step] of the pictures along each when it was chosen, the share
    `explained` [step] of the variance that it and those before it hold, and what they rebuild, [picture, d]."""

    chosen: list[int]
    spread: Tensor
    explained: Tensor
    rebuilt: Tensor


def projected(data: Tensor, texts: Tensor, rank: int) -> Tensor:
    """Texts [text, d] on the span of the first right singular vectors of data [picture, d]."""
    right = torch.linalg.svd(data, full_matrices=False).Vh[:rank]
    return texts @ right.T @ right


def span(data: Tensor, texts: Tensor, count: int, order: list[int] | None = None) -> Span:
    """At most `count` of the projected texts [text, d]: those of largest spread, or the first of `order` with any."""
    mean = data.mean(0)
    left, rebuilt = data - mean, mean.expand_as(data).clone()
    whole, longest = left.square().sum(), texts.norm(dim=-1).amax().clamp_min(1e-300)
    if whole <= ROUNDING * data.square().sum():
        texts = texts[:0]  # all pictures are the same here, and what differs is rounding
    chosen: list[int] = []
    spreads, explained = [], []
    while len(chosen) < min(count, len(texts)):
        usable = texts.norm(dim=-1) > NOTHING * longest
        if not bool(usable.any()) or left.square().sum() <= NOTHING * whole:
            break
        spread = (left @ texts.T).std(0)
        if order is None:
            best = int(torch.where(usable, spread, -1).argmax())
        else:
            open_ = [n for n in order if usable[n] and n not in chosen]
            if not open_:
                break
            best = open_[0]
        unit = texts[best] / texts[best].norm()
        part = (left @ unit)[:, None] * unit
        rebuilt, left = rebuilt + part, left - part
        texts = texts - (texts @ unit)[:, None] * unit
        chosen.append(best)
        spreads.append(spread[best])
        explained.append(1 - left.square().sum() / whole)
    kind = data.new_zeros(0)
    return Span(
        chosen,
        torch.stack(spreads) if spreads else kind,
        torch.stack(explained) if explained else kind,
        rebuilt,
    )
