"""Blank-out against float64 runs of the eager model on texts with one token replaced.

Mutations seen to fail: the answer taken anew from each blanked text, the sign kept, the blank one token off.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.analyses.tokens.blank_out import blank_out
from headwater.lens.errors import AnalysisError, PromptError


@pytest.mark.parametrize("kind", ["log_probability", "probability", "logit"])
def test_matches_runs_with_a_blank(pair, batch, kind: str) -> None:
    ids, mask = batch
    found = blank_out(pair.model, pair.model.to_tokens(ids, mask), kind=kind, blank="w60", signed=True)
    for row, real in enumerate(mask.bool()):
        text = ids[row][real]
        forms = torch.stack(
            [text, *(text.clone().index_fill_(0, torch.tensor(j), 60) for j in range(len(text)))]
        )
        with torch.no_grad():
            last = pair.twin(forms).logits[:, -1]
        reading = {"logit": last, "log_probability": last.log_softmax(-1), "probability": last.softmax(-1)}[
            kind
        ]
        values = reading[:, last[0].argmax()]
        expected = values[0] - values[1:]
        np.testing.assert_allclose(found.values[row, real.numpy()], expected, rtol=1e-3, atol=2e-5)
        assert np.isnan(found.values[row, ~real.numpy()]).all()
    assert found.dims == ("batch", "key")
    assert found.attrs["blank"] == 60


def test_difference_of_answers_is_the_papers(pairs: Callable) -> None:
    """|(p_right - p_wrong) - (p_right - p_wrong without the token)|"""
    pair = pairs("bert")
    ids = torch.arange(5, 13).view(2, 4)
    settings = {"kind": "probability", "position": 1}
    found = blank_out(
        pair.model, ids, answer=["w7", "w8"], wrong="#9", blank="<pad>", batch_size=3, **settings
    )
    for row in range(2):
        forms = torch.stack([ids[row], *(torch.where(torch.arange(4) == j, 0, ids[row]) for j in range(4))])
        with torch.no_grad():
            chances = pair.twin(forms).logits[:, 1].softmax(-1)
        difference = chances[:, 7 + row] - chances[:, 9]
        np.testing.assert_allclose(found.values[row], (difference[0] - difference[1:]).abs(), atol=1e-6)


def test_a_measure_of_ones_own_and_a_constant_one(pairs: Callable) -> None:
    model = pairs("llama").model
    ids = torch.arange(5, 13)[None]
    own = blank_out(model, ids, measure=lambda logits: logits[:, -1, 3], blank="w60")
    np.testing.assert_allclose(own, blank_out(model, ids, answer=[3], kind="logit", blank="w60"), atol=1e-5)
    assert own.attrs["measure"] == "<lambda>"  # the name of the function
    np.testing.assert_array_equal(blank_out(model, ids, measure=lambda logits: logits[:, 0, 0] * 0), 0)


def test_tokens_that_a_causal_prediction_cannot_see(causal_pair) -> None:
    ids = torch.arange(5, 13)[None]
    found = blank_out(causal_pair.model, ids, position=3).values[0]
    np.testing.assert_allclose(found[4:], 0, atol=1e-5)
    assert (found[:4] > 1e-4).all()


def test_which_blank_is_taken(pairs: Callable, one_head: hw.HookedModel) -> None:
    ids = torch.arange(5, 9)[None]
    assert (
        blank_out(pairs("llama").model, ids).attrs["blank"] == 0
    )  # the tokenizer knows a pad token and no unknown
    with pytest.raises(AnalysisError, match="has no token for a blank"):
        blank_out(one_head, ids)
    with pytest.raises(PromptError, match="blank=99 is no token"):
        blank_out(one_head, ids, blank="#99")
    with pytest.raises(PromptError, match="needs a tokenizer"):
        blank_out(one_head, ids, blank="cat")
    assert blank_out(one_head, torch.tensor([[5]]), blank="#0").shape == (1, 1)
