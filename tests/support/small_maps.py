"""Small attention problems in float64 for the tests of normalisers, documents and ALiBi."""

from __future__ import annotations

import torch

from headwater.kernels.attend import attend
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask

HEADS, N, WIDTH = 4, 9, 8
CAUSAL, FULL = Mask(N, N, right=0), Mask(N, N)


def problem(n: int = N, size: float = 2.0, batch: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, n, WIDTH).double() for heads in (HEADS, 2, 2))
    return q * size, k, v


def map_of(mask: Mask, kind: Normaliser | None, operands=None, **more) -> AttentionMap:
    q, k, v = problem() if operands is None else operands
    return attend(q, k, v, ScoreRule(0.4, mask, normaliser=kind, **more))[1]


def fitting(kind: Normaliser) -> Mask:
    return FULL if kind.name == "sinkhorn" else CAUSAL


def dense(map: AttentionMap) -> torch.Tensor:
    batch, heads, queries, keys = map.shape
    return map.block(Block(slice(0, batch), torch.arange(heads), slice(0, queries), slice(0, keys)))
