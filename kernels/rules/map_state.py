"""`MapState` holds the O(S·d) numbers that define a layer's attention maps and the exact weights of any block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.kernels.edits.mixing import MixHeads
from headwater.kernels.edits.weights import ScaleKeys, Shares, WeightStep
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import Block, tile_dtype
from headwater.kernels.tiles.mask import Mask
from headwater.kernels.tiles.row_blocks import blocks
from headwater.kernels.tiles.shapes import Keys, PerQuery, Queries, Tile


@dataclass(frozen=True, eq=False)
class MapState:
    """The maps of one layer.

    `lse` is +inf on the rows that have no weights (padding, or every key hidden): `of` marks them. `backend` is the
    name of the backend that computes products and statistics, or "auto". `known` holds row statistics that came out of
    the forward pass already, with the conventions of kernels/maps/statistics.py.
    """

    # saved records are checked against these annotations as they are written: they have to name Tensor themselves
    q: Float[Tensor, "batch head query d_head"]
    k: Float[Tensor, "batch kv_head key d_head"]
    rule: ScoreRule
    lse: Float[Tensor, "batch head query"]
    steps: tuple[WeightStep, ...] = ()
    backend: str = "auto"
    known: Mapping[str, Float[Tensor, "batch head query"]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        q: Queries,
        k: Keys,
        rule: ScoreRule,
        lse: PerQuery,
        steps: tuple[WeightStep, ...] = (),
        backend: str = "auto",
        known: Mapping[str, PerQuery] | None = None,
    ) -> Self:
        """From a forward pass: rows that are padding or see nothing get lse = +inf, hence no weights."""
        if lse.device.type == "cpu" and rule.mask.valid_queries is None and math.isfinite(lse.detach().sum()):
            return cls(q, k, rule, lse, steps, backend, known or {})  # one look at short rows, which are many
        silent = lse == float("-inf")
        # scores that overflowed are not a row without weights
        lse = lse.masked_fill(lse == float("inf"), torch.nan)
        if rule.mask.valid_queries is not None:
            silent = silent | ~rule.mask.valid_queries[:, None].to(lse.device)
        return cls(q, k, rule, lse.masked_fill(silent, float("inf")), steps, backend, known or {})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        return (self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2])

    @property
    def mask(self) -> Mask:
        return self.rule.mask

    @property
    def signed(self) -> bool:
        """Whether weights may be negative."""
        signed = self.rule.signed
        for edit in (step.edit for step in self.steps):
            if isinstance(edit, Shares):
                signed = False
            elif isinstance(edit, ScaleKeys | MixHeads):
                signed = signed or edit.signed
        return signed

    @property
    def mixes(self) -> bool:
        """Whether the weight of a pair takes scores or weights of other heads: blocks of all heads then cost least."""
        return self.rule.mixes or any(isinstance(step.edit, MixHeads) for step in self.steps)

    def row_blocks_of(self, elements: int | None = None) -> Iterator[Block]:
        """All rows of all heads in blocks, over the columns that the band shows them."""
        batch, heads = self.shape[:2]
        return blocks(batch, range(heads), self.mask, elements, self.mixes)

    def log_weights(self, block: Block) -> Tile:
        """Logarithms of the unedited weights of a block, -inf where hidden; a new tensor that may be written to.

        Of signed weights it gives the logarithms of their sizes.
        """
        scores = self.rule.scores(self.q, self.k, block)
        row = block.of_rows(self.lse).to(scores)[..., None]
        kind = self.rule.normaliser
        if kind is not None:
            logs = kind.logs(scores) - row
            return logs.clamp(max=0) if kind.bounded else logs
        if scores.requires_grad:
            return (scores - row).clamp(max=0)
        # no weight exceeds 1: at scores of 1e4 the rounding of another kernel's lse would say otherwise
        return scores.sub_(row).clamp_(max=0)

    def block(self, block: Block) -> Tile:
        """Edited weights of any block, in float32 or float64, from lse and row factors."""
        tile = self._stepped(block, self.steps)
        if self.steps:
            # a row of padding has factors, but takes part in nothing
            tile = tile.masked_fill(torch.isposinf(block.of_rows(self.lse))[..., None], 0.0)
        return tile

    def _stepped(self, block: Block, steps: tuple[WeightStep, ...]) -> Tensor:
        """Weights of a block after the first steps."""
        last = max((n for n, step in enumerate(steps) if isinstance(step.edit, MixHeads)), default=-1)
        if last >= 0:
            tile = self._mixed(block, steps[:last], steps[last])
        elif self.rule.normaliser is None:
            tile = self.log_weights(block).exp_()
        else:
            scores = self.rule.scores(self.q, self.k, block)
            tile = self.rule.normaliser.weights(scores, block.of_rows(self.lse).to(scores)[..., None])
        for step in steps[last + 1 :]:
            factors = tuple(block.of_rows(factor).to(tile) for factor in step.factors)
            tile = step.edit.apply(tile, factors, block, self.mask)
        return tile

    def _mixed(self, block: Block, before: tuple[WeightStep, ...], step: WeightStep) -> Tensor:
        """Weights of a block after a mixture of heads; rows without weights keep none."""
        assert isinstance(step.edit, MixHeads)
        tile = step.edit.mixed(lambda there: self._stepped(there, before), block, self.mask, self.shape[1])
        acts = block.of_rows(step.factors[0]).to(tile)[..., None] > 0
        return torch.where(acts, tile, 0.0)

    @property
    def dtype(self) -> torch.dtype:
        """The type of its blocks."""
        return tile_dtype(self.q)
