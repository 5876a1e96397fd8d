"""Edits of scores, tile by tile: a factor, a bias, -inf on a set of pairs.

They act in their order, after cap and bias of the model and before the mask. A pair that an edit or the bias has
hidden (-inf) stays hidden whatever edit follows. What takes other heads or pairs is in `mixing.py`. `heads` is bool
[head] or [batch|1, head].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.kernels.edits.mixing import ConvolveScores, MixHeads
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import HIDDEN, IndexMask, Mask


@dataclass(frozen=True, eq=False)
class ScaleScores:
    """s -> tau*s for the chosen heads."""

    heads: Tensor
    tau: float

    def apply(self, scores: Tensor, block: Block, mask: Mask) -> Tensor:
        chosen = block.of_heads(self.heads).to(scores.device)
        factor = torch.where(chosen, scores.new_tensor(self.tau), 1.0)
        if self.tau > 0:
            return scores * factor
        # 0 * -inf is NaN
        hidden = scores == HIDDEN
        return (scores.masked_fill(hidden, 0.0) * factor).masked_fill(hidden, HIDDEN)


@dataclass(frozen=True, eq=False)
class BlockScores:
    """s -> -inf on queries × keys of the chosen heads; what is left of the row is renormalised by the softmax."""

    heads: Tensor
    queries: Tensor
    keys: Tensor

    def apply(self, scores: Tensor, block: Block, mask: Mask) -> Tensor:
        return scores.masked_fill(_pairs(self, block).to(scores.device), HIDDEN)


@dataclass(frozen=True, eq=False)
class BiasKeys:
    """s -> s + bias of the key, on the chosen heads; `bias` is [batch|1, key] or [batch|1, head, key]."""

    heads: Tensor
    bias: Tensor

    def apply(self, scores: Tensor, block: Block, mask: Mask) -> Tensor:
        chosen = block.of_heads(self.heads).to(scores.device)
        return scores + torch.where(chosen, block.of_keys(self.bias).to(scores), 0.0)


@dataclass(frozen=True, eq=False)
class EmphasiseScores:
    """s -> s + amount*|s| on queries × keys of the chosen heads (PAINT, Arif et al. 2025, from its public code)."""

    heads: Tensor
    queries: Tensor
    keys: Tensor
    amount: float

    def apply(self, scores: Tensor, block: Block, mask: Mask) -> Tensor:
        hidden = scores == HIDDEN
        size = scores.masked_fill(hidden, 0.0).abs()
        return scores + torch.where(_pairs(self, block).to(scores.device), self.amount * size, 0.0)


@dataclass(frozen=True, eq=False)
class MaskScores:
    """s -> -inf on the chosen heads where `visible(batch, head, query, key)` is False; positions are absolute."""

    heads: Tensor
    visible: IndexMask

    def apply(self, scores: Tensor, block: Block, mask: Mask) -> Tensor:
        rows, columns = block.positions(scores.device)
        batch = torch.arange(block.batch.start, block.batch.stop, device=scores.device)[:, None, None, None]
        head = block.heads.to(scores.device)[None, :, None, None]
        seen = self.visible(batch, head, rows + mask.query_offset, columns + mask.key_offset)
        chosen = block.of_heads(self.heads).to(scores.device)
        return scores.masked_fill(chosen & ~seen, HIDDEN)


PlainScoreEdit = ScaleScores | BlockScores | BiasKeys | EmphasiseScores | MaskScores
ScoreEdit = PlainScoreEdit | MixHeads | ConvolveScores


def _pairs(edit: BlockScores | EmphasiseScores, block: Block) -> Tensor:
    """The chosen pairs of a tile, bool [batch|1, head, row, column]."""
    heads, queries = block.of_heads(edit.heads), block.of_queries(edit.queries)
    keys = block.of_keys(edit.keys)
    return heads.to(keys.device) & queries.to(keys.device) & keys
