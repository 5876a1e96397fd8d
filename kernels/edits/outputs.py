"""Edits of a head's output z [batch, head, query, d_head], before the output projection.

`heads` is bool [head] or [batch|1, head]. Values that differ by position are read at the rows' positions, counted as
the caller counts them. Where fewer samples than batch rows are given, batch row b takes sample b, and begins anew after
the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gate:
    """z -> gate*z per head; `gate` [batch|1, head] or [batch|1, head, query] may carry a gradient.

    A gate of exactly 0 gives 0 even where z is infinite.
    """

    gate: Tensor

    def apply(self, output: Tensor, positions: Tensor) -> Tensor:
        gate = self.gate.to(output)
        gate = gate[..., None] if gate.dim() == 3 else gate[:, :, None, None]
        if gate.requires_grad:
            return output * gate
        return torch.where(gate == 0, torch.zeros_like(output), output * gate)


@dataclass(frozen=True, eq=False)
class ReplaceOutput:
    """z -> values on the chosen heads; `values` [sample, head, position|1, d_head]."""

    heads: Tensor
    values: Tensor

    def apply(self, output: Tensor, positions: Tensor) -> Tensor:
        return torch.where(_chosen(self.heads, output), _read(self.values, output, positions), output)


@dataclass(frozen=True, eq=False)
class OffsetOutput:
    """z -> z + values on the chosen heads; `values` [sample, head, position|1, d_head]."""

    heads: Tensor
    values: Tensor

    def apply(self, output: Tensor, positions: Tensor) -> Tensor:
        moved = output + _read(self.values, output, positions)
        return torch.where(_chosen(self.heads, output), moved, output)


OutputEdit = Gate | ReplaceOutput | OffsetOutput


def _chosen(heads: Tensor, output: Tensor) -> Tensor:
    heads = heads if heads.dim() == 2 else heads[None]
    return heads.to(output.device)[:, :, None, None]


def _read(values: Tensor, output: Tensor, positions: Tensor) -> Tensor:
    """Values of each batch row at `positions` [batch|1, query], broadcastable to the output."""
    values = values.to(output)[torch.arange(len(output)) % len(values)]
    if values.shape[2] == 1:
        return values
    place = positions.expand(len(output), -1).clamp_min(0)[:, None, :, None]
    return values.gather(2, place.to(values.device).expand(-1, *values.shape[1:2], -1, values.shape[3]))
