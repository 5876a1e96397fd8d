"""A block of rows of an attention map, and the part of a whole map's tensors that belongs to it.

A block has a range of key columns, or a few of them chosen for each row: formulas that read keys through `of_keys`,
`of_pairs` and `positions` serve both, so that tiles and single pairs have one formula.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headwater.kernels.tiles.heads import per_batch_row


class Block(NamedTuple):
    """Rows `rows` of the query heads `heads` of `batch`, over the key columns `columns`.

    With `chosen`, over those alone, int64 [batch|1, head|1, row|1, column]; `columns` is then a range that holds them.
    """

    batch: slice
    heads: Tensor
    rows: slice
    columns: slice
    chosen: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(row, column)."""
        width = self.columns.stop - self.columns.start if self.chosen is None else self.chosen.shape[-1]
        return self.rows.stop - self.rows.start, width

    def of_heads(self, given: Tensor) -> Tensor:
        """[head] or [batch|1, head] → [batch|1, head of the block, 1, 1]."""
        given = self.of_batch(per_batch_row(given))
        return given[:, self.heads.to(given.device), None, None]

    def of_queries(self, given: Tensor) -> Tensor:
        """[batch|1, query] → [batch|1, 1, row, 1]."""
        return self.of_batch(given)[:, None, self.rows, None]

    def of_rows(self, given: Tensor) -> Tensor:
        """[batch|1, head|1, query] → [batch|1, head|1, row]."""
        return self.of_maps(given[:, :, self.rows])

    def of_keys(self, given: Tensor) -> Tensor:
        """[batch|1, key] or [batch|1, head|1, key] → [batch|1, head|1, row|1, column]."""
        given = given[:, None] if given.dim() == 2 else given
        return self.of_columns(self.of_maps(given)[:, :, None])

    def of_pairs(self, given: Tensor) -> Tensor:
        """[batch|1, head|1, query|1, key|1] → [batch|1, head|1, row|1, column|1]."""
        given = self.of_maps(given if given.shape[2] == 1 else given[:, :, self.rows])
        return given if given.shape[3] == 1 else self.of_columns(given)

    def of_columns(self, given: Tensor) -> Tensor:
        """[batch|1, head|1, row|1, key] → [batch|1, head|1, row|1, column]."""
        if self.chosen is None:
            return given[..., self.columns]
        return torch.take_along_dim(given, self.chosen.to(given.device), 3)

    def of_maps(self, given: Tensor) -> Tensor:
        """[batch|1, head|1, ...] → the batch rows and heads of the block."""
        given = self.of_batch(given)
        return given if given.shape[1] == 1 else given[:, self.heads.to(given.device)]

    def of_batch(self, given: Tensor) -> Tensor:
        """[batch|1, ...] → the batch rows of the block; one row stands for all."""
        return given if given.shape[0] == 1 else given[self.batch]

    def positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row numbers [1, 1, row, 1] and column numbers [batch|1, head|1, row|1, column]."""
        rows = torch.arange(self.rows.start, self.rows.stop, device=device)[None, None, :, None]
        if self.chosen is not None:
            return rows, self.chosen.to(device)
        columns = torch.arange(self.columns.start, self.columns.stop, device=device)
        return rows, columns[None, None, None]


def tile_dtype(like: Tensor) -> torch.dtype:
    """The type that tiles of scores and weights are computed in: float64 for float64 tensors, else float32."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32
