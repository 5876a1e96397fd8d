"""Batches of unequal length for the tiny models of the analyses' tests."""

from __future__ import annotations

import torch
from torch import Tensor

VOCAB = 61


def padded(
    lengths: tuple[int, ...] = (9, 12, 4), side: str = "right", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random token ids and their mask, rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    place = torch.arange(width)
    counts = torch.tensor(lengths)[:, None]
    mask = place < counts if side == "right" else place >= width - counts
    return ids.masked_fill(~mask, 0), mask.long()
