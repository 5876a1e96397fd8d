"""In the tests a call whose tensors do not have the shapes of its signature fails."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from headwater.kernels.attend import attend
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask


def test_the_tests_hold_calls_to_the_shapes_in_their_signatures() -> None:
    q, k, v = torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 1, 5, 8)
    with pytest.raises(jaxtyping.TypeCheckError, match="batch kv_head key d_value"):
        attend(q, k, v, ScoreRule(0.3, Mask(6, 5)))
