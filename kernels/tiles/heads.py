"""Tensors per key head or per head, brought to one layout."""

from __future__ import annotations

from torch import Tensor


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """[batch, kv head, ...] → [batch, head, ...]: each key head for all query heads that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def per_batch_row(heads: Tensor) -> Tensor:
    """[head] or [batch|1, head] as [batch|1, head]."""
    return heads if heads.dim() == 2 else heads[None]
