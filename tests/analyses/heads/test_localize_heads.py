"""The scales of LoFiT on losses that one head moves, or none.

Mutation seen to fail: the price left out.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.analyses.heads.localize_heads import most_moved
from headwater.lens.errors import AnalysisError, HeadwaterError
from headwater.lens.loading import zoo

IDS = torch.tensor([[3, 9, 4], [5, 7, 8], [6, 6, 2]])


def likes_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return -logits[:, -1].log_softmax(-1)[:, 11]


def test_the_head_that_pays_is_localised(pairs) -> None:
    """The loss falls with the length of one head's output, and the price brings all other scales to 0."""
    model = pairs("gpt2").model
    seen: list[Tensor] = []
    watched = model.hf.transformer.h[1].attn.c_proj
    handle = watched.register_forward_hook(lambda _, args, out: seen.append(args[0]))

    def loss(logits: Tensor, tokens: Tensor) -> Tensor:
        return -seen[-1].unflatten(-1, (4, -1))[:, -1, 2].square().sum(-1) + 0 * logits[:, -1, 0]

    found = analyses.localize_heads(model, IDS, loss=loss, steps=15, rate=0.02, penalty=0.05)
    handle.remove()
    assert most_moved(found, 1) == [hw.Head(1, 2)]
    assert float(found.loss_after) < float(found.loss_before)
    np.testing.assert_allclose(found.score, np.linalg.norm(found.scale, axis=-1), rtol=1e-6)


def test_a_price_alone_brings_scales_to_nothing(uniform: hw.HookedModel) -> None:
    """No head moves this model's loss: from N(0, 1e-3) Adam's steps of 1e-3 lead to 0 and stay around it."""
    free = analyses.localize_heads(uniform, IDS, penalty=0.0, steps=1, rate=1e-9)
    assert float(free.score.mean()) / 8**0.5 == pytest.approx(1e-3, rel=0.15)
    paid = analyses.localize_heads(uniform, IDS, penalty=1.0, steps=40, rate=1e-4)
    assert float(paid.score.max()) < 0.5 * float(free.score.min())  # the same start


def test_what_can_not_be_localised(pairs) -> None:
    with pytest.raises(AnalysisError, match="loss and answer"):
        analyses.localize_heads(pairs("gpt2").model, IDS, loss=likes_token, answer="w3")
    with pytest.raises(HeadwaterError, match="loss="):
        analyses.localize_heads(pairs("bert").model, IDS)


def test_values_that_are_narrower_than_queries() -> None:
    model = hw.load(zoo.build("deepseek_v3"))
    found = analyses.localize_heads(model, zoo.inputs("deepseek_v3")["input_ids"], steps=1)
    assert found.sizes["feature"] == 8 < model.d_head
