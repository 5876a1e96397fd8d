"""An attention mask of pairs, as transformers takes one: [batch, 1, query, key], or [query, key] for all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.lens.errors import PromptError


def is_of_pairs(given: Any, shape: tuple[int, ...]) -> bool:
    """Whether a mask for ids of this shape is one of pairs: four axes, or [query, key] that is no [batch, position]."""
    if not isinstance(given, Tensor | np.ndarray):
        return False
    return given.ndim == 4 or (
        given.ndim == 2 and given.shape == (shape[1],) * 2 and tuple(given.shape) != shape
    )


def pair_mask(given: Tensor | np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """The mask [batch, 1, query, key] for ids of this shape: bool, True where visible, or numbers to add to the scores.

    Whole numbers are 1 where visible. PromptError for another shape, NaN, and floats of 0 and 1, which could mean both.
    """
    batch, length = shape
    full = torch.as_tensor(given)
    full = full[None, None] if full.dim() == 2 else full
    if full.shape[0] not in (1, batch) or full.shape[1] != 1 or tuple(full.shape[2:]) != (length, length):
        raise PromptError(
            f"a mask of pairs is [batch, 1, query, key] = [{batch}, 1, {length}, {length}] or [query, key]; got "
            f"{list(given.shape)}"
        )
    if full.is_floating_point():
        if full.isnan().any() or (full > 0).any() or not (full < 0).any():
            raise PromptError(
                "a mask of pairs in floating-point numbers is added to the scores: 0 where visible, minus infinity "
                "where hidden; give a bool mask otherwise"
            )
    elif full.dtype != torch.bool:
        if not ((full == 0) | (full == 1)).all():
            raise PromptError("a mask of pairs in whole numbers holds 1 where visible and 0 where hidden")
        full = full.bool()
    return full.expand(batch, -1, -1, -1)
