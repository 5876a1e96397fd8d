"""A small attention problem in float64 with edits, through the blocks of rows, and sets for the edits to choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from headwater.kernels.attend import attend
from headwater.kernels.edits.scores import ScoreEdit
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask

HEADS, N = 3, 7
EVERY, SOME = torch.ones(HEADS) > 0, torch.tensor([True, False, True])
PER_ROW = torch.tensor([[True, False, False], [False, True, True]])
ALL = torch.ones(1, N) > 0
CAUSAL = Mask(N, N, right=0)
FIRST = torch.arange(N)[None] == 0
ODD = torch.arange(N)[None] % 2 == 1


def operands(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, HEADS, N, 4, generator=generator, dtype=dtype) for _ in range(3)]


def run(
    scores: tuple[ScoreEdit, ...] = (), weights: tuple[WeightEdit, ...] = (), mask: Mask = CAUSAL, **rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and map under edits, through the blocks."""
    z, map = attend(*operands(), ScoreRule(0.6, mask, edits=scores, **rule), weights, "blocked")
    return z, dense(map)


def dense(map: MapState) -> torch.Tensor:
    return map.block(Block(slice(0, 2), torch.arange(HEADS), slice(0, map.shape[2]), slice(0, map.shape[3])))


def each_row_alone(edit: ScoreEdit | WeightEdit, run_with: Callable) -> None:
    """A batch row of the edited map is that of an edit on the row's own heads."""
    found = run_with(edit)[1]
    for b in range(2):
        assert torch.equal(found[b], run_with(replace(edit, heads=PER_ROW[b]))[1][b])
