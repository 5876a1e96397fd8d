"""A block of rows of an attention map, and what belongs to it of tensors that are given for the whole map."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Rows `rows` of the query heads `heads` of `batch`, over the key columns `columns`."""

    batch: slice
    heads: Tensor
    rows: slice
    columns: slice

    def of_heads(self, given: Tensor) -> Tensor:
        """[head] or [batch|1, head] → [batch|1, head of the block]."""
        return self.of_batch(given if given.dim() == 2 else given[None])[:, self.heads.to(given.device)]

    def of_queries(self, given: Tensor) -> Tensor:
        """[batch|1, query] → [batch|1, row]."""
        return self.of_batch(given)[:, self.rows]

    def of_keys(self, given: Tensor) -> Tensor:
        """[batch|1, key] → [batch|1, column]."""
        return self.of_batch(given)[:, self.columns]

    def of_batch(self, given: Tensor) -> Tensor:
        """[batch|1, ...] → the batch rows of the block; one row stands for all."""
        return given if given.shape[0] == 1 else given[self.batch]

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and column numbers as [row, 1] and [1, column]."""
        rows = torch.arange(self.rows.start, self.rows.stop, device=device)
        columns = torch.arange(self.columns.start, self.columns.stop, device=device)
        return rows[:, None], columns[None]
