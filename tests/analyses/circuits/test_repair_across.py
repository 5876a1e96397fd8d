"""Heads of cross-attention, and of texts with pictures, forced onto the tokens of wrong answers.

The oracle is the plain transformers model in which hooks by hand put the mean of the values at those tokens in the
place of what the head gives. Mutation seen to fail: the decoder's tokens taken for the keys.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from patched_by_hand import ByHand

import headwater as hw
from headwater.lens.errors import AnalysisError

D = 8


@pytest.mark.parametrize(("name", "part", "group"), [("t5", "cross", 1), ("llava", "text", 2)])
def test_forced_by_hand(name: str, part: str, group: int) -> None:
    hand = ByHand(name, part)
    rows = [tokens.rows([0]) for tokens in hand.pair()]
    keys = hand.sides[0]["input_ids"][0]
    wrong, answer = int(keys[-3]), int(keys[-1])
    found = hw.analyses.repair(
        hand.model, *rows, heads="1.2", movers="1.3", answer=answer, wrong=wrong, controls=1, draws=2
    )
    spots = (keys == wrong).nonzero()[:, 0].tolist()
    values: list[torch.Tensor] = []
    handles = [hand.modules["value", 1].register_forward_hook(lambda _, a, out: values.append(out.detach()))]
    span = slice(2 * D, 3 * D)

    def force(_: Any, args: Any) -> Any:
        z, shared = args[0].clone(), slice(2 // group * D, 2 // group * D + D)
        z[:, -1, span] = values[-1][:, spots, shared].mean(1)
        return (z, *args[1:])

    def difference() -> float:
        with torch.no_grad():
            logits = hand.plain(**{key: given[:1] for key, given in hand.sides[0].items()}).logits[0, -1]
        return float(logits[answer] - logits[wrong])

    before = difference()
    handles.append(hand.modules["heads", 1].register_forward_pre_hook(force))
    after = difference()
    for handle in handles:
        handle.remove()
    told = found.difference.sel(treatment=["none", "forced"])[:, 0]
    np.testing.assert_allclose(told, [before, after], rtol=1e-4, atol=1e-5)
    assert abs(after - before) > 1e-4


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("vit_classifier", "vision", "has no language head"),
        ("whisper", "cross", "look at audio, in which no answer"),
    ],
)
def test_where_no_answer_stands(name: str, part: str, message: str) -> None:
    hand = ByHand(name, part)
    with pytest.raises(AnalysisError, match=message):
        hw.analyses.repair(hand.model, *hand.pair())
