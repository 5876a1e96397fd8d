"""Largest scores against scores by hand in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ragged import padded

import headwater as hw
from headwater.analyses.heads.max_logits import max_logits
from headwater.lens.errors import AnalysisError


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "gpt_oss"])
def test_largest_scores_by_hand(pairs: Callable, name: str) -> None:
    ids, mask = padded((9, 12, 6), side="left")
    record = pairs(name).model.record(ids, attention_mask=mask)
    found = max_logits(record, clip=0.5)
    for layer in record.layers:
        map = record.map(layer)
        q, k = map.q.double(), map.k.double().repeat_interleave(map.q.shape[1] // map.k.shape[1], 1)
        scores = map.rule.scale * q @ k.mT
        scores = scores if name != "gemma2" else 2 * torch.tanh(scores / 2)
        scores = scores.masked_fill(map.dense() == 0, -torch.inf)
        rows = np.where(mask[:, None].bool(), scores.amax(-1), np.nan)
        at = found.sel(layer=layer)
        np.testing.assert_allclose(at.row_max, rows, rtol=1e-4, atol=1e-5)
        largest = np.nanmax(rows, (0, 2))
        np.testing.assert_allclose(at.max_logit, largest, rtol=1e-4)
        np.testing.assert_allclose(at.factor, np.minimum(1, 0.5 / largest), rtol=1e-4)
        for last in (5, 11):
            np.testing.assert_allclose(
                at.running[:, last], np.nanmax(rows[..., : last + 1], (0, 2)), rtol=1e-4
            )
    assert float(found.factor.min()) < 1


def test_weights_that_are_no_softmax_are_refused(pairs: Callable) -> None:
    model = pairs("gpt2").model
    with model.edit(hw.ScaleWeights(keys=0, factor=0.5)):
        record = model.record(torch.arange(3, 12)[None])
    with pytest.raises(AnalysisError, match="edited weights"):
        max_logits(record)
