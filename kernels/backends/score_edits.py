"""Score edits in the form of fused kernels: a factor per head, a bias per key, and hidden pairs.

`why_not` refuses the other score edits by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from headwater.kernels.edits.scores import BiasKeys, BlockScores, ScaleScores, ScoreEdit
from headwater.kernels.tiles.heads import per_batch_row
from headwater.kernels.tiles.mask import HIDDEN

LEAST_BIAS, MOST_BIAS = -math.log(2), 60.0


def why_not(edits: Sequence[ScoreEdit]) -> str | None:
    """The first edit that is none of the three, or None."""
    for edit in edits:
        if not isinstance(edit, ScaleScores | BiasKeys | BlockScores):
            return f"the score edit {type(edit).__name__}"
    return None


def touched(edits: Sequence[ScoreEdit], keys: int) -> Tensor:
    """Keys whose scores are hidden or moved somewhere, bool [key]; a factor on all scores of a head touches none."""
    found = torch.zeros(keys, dtype=torch.bool)
    for edit in edits:
        if isinstance(edit, BlockScores):
            found |= edit.keys.any(0).cpu()
        elif isinstance(edit, BiasKeys):
            found |= (edit.bias != 0).flatten(0, -2).any(0).cpu()
    return found


def of_all_keys(edits: Sequence[ScoreEdit]) -> tuple[ScoreEdit, ...]:
    """The edits that act on the keys that none has `touched`."""
    return tuple(edit for edit in edits if isinstance(edit, ScaleScores))


def raised(edits: Sequence[ScoreEdit], like: Tensor) -> Tensor | None:
    """The bias [batch|1, head, key] that the edits add to the scores, where that is all they do, it makes no weight
    less than half of what it is beside the others, and its exponential is a number; else None."""
    if not edits or not all(isinstance(edit, BiasKeys) for edit in edits):
        return None
    _, bias = factor_and_bias(edits, like)
    return bias if bias is not None and bool(((bias >= LEAST_BIAS) & (bias <= MOST_BIAS)).all()) else None


def factor_and_bias(edits: Sequence[ScoreEdit], like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The edits in their order as factor * s + bias: [batch|1, head] and [batch|1, head, key], None where not needed.

    Hidden pairs become a bias of -inf on their keys, for every query.
    """
    factor: Tensor | None = None
    bias: Tensor | None = None
    for edit in edits:
        assert isinstance(edit, ScaleScores | BiasKeys | BlockScores)
        heads = per_batch_row(edit.heads).to(like.device)
        if isinstance(edit, ScaleScores):
            tau = torch.where(heads, like.new_tensor(edit.tau), 1.0)
            factor = tau if factor is None else factor * tau
            if bias is not None:
                bias = torch.where(bias == HIDDEN, bias, bias * tau[..., None])
            continue
        if isinstance(edit, BiasKeys):
            given = edit.bias if edit.bias.dim() == 3 else edit.bias[:, None]
            new = torch.where(heads[..., None], given.to(like), 0.0)
        else:
            hidden = heads[..., None] & edit.keys[:, None].to(like.device)
            new = torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, HIDDEN)
        bias = new if bias is None else bias + new
    return factor, bias
