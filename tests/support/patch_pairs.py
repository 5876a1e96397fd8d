"""Two pairs of prompts of six tokens, what is asked of them, and the same asked of logits."""

from __future__ import annotations

import torch
from torch import Tensor

CLEAN = torch.tensor([[5, 17, 30, 8, 22, 9], [40, 9, 3, 31, 7, 13]])
CORRUPT = torch.tensor([[5, 17, 44, 8, 51, 9], [40, 9, 6, 31, 7, 13]])
ANSWER, WRONG = ["#11", "#12"], ["#20", "#45"]


def difference(logits: Tensor) -> Tensor:
    """Logit of the answer less that of the wrong one at the last position, [pair]."""
    rows = torch.arange(2)
    return logits[rows, -1, torch.tensor([11, 12])] - logits[rows, -1, torch.tensor([20, 45])]
