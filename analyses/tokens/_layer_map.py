"""One map per layer from its heads and the residual stream: the maps that rollout and flow follow.

`Ã = rownorm((1 - w)·Ā + w·I)`, where `Ā` is the mean of the heads (plain or weighted) or their largest or smallest
weights. A row without any weight keeps its own position when w > 0, and is undefined (NaN) otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._streams.between_layers import refuse_mixers
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record

Reduction = Literal["mean", "max", "min"]
EXTREMES: dict[str, Callable[..., Tensor]] = {"max": torch.amax, "min": torch.amin}


@dataclass(frozen=True, eq=False)
class Joining:
    """How the heads of `layers` are joined: `weight` is the residual stream's w, `mixing` the name of a reduction or
    head weights [layer, head] that sum to 1 in each layer.
    """

    layers: list[int]
    weight: float
    mixing: str | Tensor

    @classmethod
    def of(
        cls, record: Record, residual: float, heads: Reduction | Sequence[Sequence[float]], add_residual: bool,
        last_layer: int | None,
    ) -> Joining:  # fmt: skip
        refuse_mixers(record.provenance.get("model"), record.mixers, "a product of maps", high=last_layer)
        layers = consecutive_layers(record, last_layer)
        mixing = head_mixing(heads, layers, record.n_heads)
        return cls(layers, residual if add_residual else 0.0, mixing)

    def of_layer(self, depth: int) -> str | Tensor:
        return self.mixing if isinstance(self.mixing, str) else self.mixing[depth]


def consecutive_layers(record: Record, last: int | None) -> list[int]:
    """The record's layers up to `last`. AnalysisError where one in between is missing or has signed weights."""
    layers = [layer for layer in record.layers if last is None or layer <= last]
    if not layers or (last is not None and layers[-1] != last):
        raise AnalysisError(f"last_layer={last} is not in this record; it has layers {record.layers}")
    known = record.provenance.get("attention_layers", range(layers[-1]))
    gap = [layer for layer in known if layers[0] < layer < layers[-1] and layer not in layers]
    if gap:
        raise AnalysisError(
            f"layer {gap[0]} is missing from this record; layers are followed one into the next"
        )
    signed = [layer for layer in layers if layer in record.maps and record.maps[layer].signed]
    if signed:
        raise AnalysisError(
            f"the weights of layer {signed[0]} may be negative, so they are no shares and no capacities; "
            "record without that normaliser"
        )
    return layers


def head_mixing(
    heads: Reduction | Sequence[Sequence[float]], layers: list[int], n_heads: int
) -> str | Tensor:
    """The name of a reduction, or head weights [layer, head] that sum to 1 in each layer."""
    if isinstance(heads, str):
        return heads if heads != "mean" else torch.full((len(layers), n_heads), 1 / n_heads)
    weights = torch.as_tensor(np.asarray(heads), dtype=torch.float32)
    if weights.shape != (len(layers), n_heads):
        raise AnalysisError(
            f"heads must hold weights [layer, head] = {(len(layers), n_heads)}, got shape {tuple(weights.shape)}"
        )
    total = weights.sum(1, keepdim=True)
    if not (weights >= 0).all() or not (total > 0).all():
        raise AnalysisError("heads must hold weights of 0 or more with at least one above 0 in every layer")
    return weights / total


def over_row_sums(rows: Tensor, mass: Tensor, weight: float) -> Tensor:
    """`rows` divided by the row sums of (1 - w)·A + w·I; NaN where a nonzero entry is on a row without weight."""
    total = ((1 - weight) * mass + weight)[..., None]
    return torch.where(rows == 0, 0.0, rows / torch.where(total > 0, total, torch.nan))


def joined_map(map: AttentionMap, weight: float, mixing: str | Tensor) -> Tensor:
    """Ã of one layer, dense [batch, query, key] in float64, read block by block; quadratic memory."""
    batch, _, queries, keys = map.shape
    joined = torch.zeros(batch, queries, keys, dtype=torch.float64)
    for span, weights in map.row_blocks():
        weights = weights.double().cpu()
        if isinstance(mixing, str):
            joined[:, span] = EXTREMES[mixing](weights, dim=1)
        else:
            joined[:, span] = torch.einsum("h,bhqk->bqk", mixing.double(), weights)
    mixed = (1 - weight) * joined + weight * torch.eye(queries, keys, dtype=torch.float64)
    return mixed / mixed.sum(-1, keepdim=True)
