"""What an edit of attention is, as tensors: it acts on scores, then on weights, then on a head's output.

`edits_scores.py`: s -> tau*s, s + bias, s + amount*|s|, or -inf on a set of pairs. `edits_weights.py`: P rescaled on a
key set with the freed mass handed to another, or mixed with the identity or a pattern (`patterns.py`).
`edits_outputs.py`: z -> gate*z, z + values, or replaced. The dense meaning of each stands in `reference.py`. Head masks
are bool [head] or [batch|1, head]; positions are bool [batch|1, query] or [batch|1, key].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from headwater.kernels.edits.outputs import Gate, OffsetOutput, OutputEdit, ReplaceOutput
from headwater.kernels.edits.scores import (
    BiasKeys,
    BlockScores,
    EmphasiseScores,
    MaskScores,
    ScaleScores,
    ScoreEdit,
)
from headwater.kernels.edits.weights import (
    NOTHING,
    SMALL,
    MixIdentity,
    MixPattern,
    Rescale,
    RowCondition,
    Shares,
    WeightEdit,
)

__all__ = [
    "NOTHING",
    "SMALL",
    "BiasKeys",
    "BlockScores",
    "EmphasiseScores",
    "Gate",
    "MaskScores",
    "MixIdentity",
    "MixPattern",
    "OffsetOutput",
    "OutputEdit",
    "ReplaceOutput",
    "Rescale",
    "RowCondition",
    "ScaleScores",
    "ScoreEdit",
    "Shares",
    "WeightEdit",
    "WeightStep",
]


@dataclass(frozen=True, eq=False)
class WeightStep:
    """A weight edit with the row factors that one forward pass gave it, each [batch, head, query].

    With its factors known, an edit is applied to any tile without looking at the rest of the row.
    """

    edit: WeightEdit
    factors: tuple[Tensor, ...]
