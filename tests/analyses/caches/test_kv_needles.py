"""Needle tests on a cache of fewer keys against transformers' own cache, from which the keys were taken, in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from evicted_by_hand import RULES, kept_by_hand, logits_by_hand, loss_by_hand

import headwater as hw
from headwater.analyses._prompts.needles import needles
from headwater.analyses.caches.kv_needles import kv_needles
from headwater.analyses.caches.kv_scores import kv_scores
from headwater.lens.errors import AnalysisError

ASKED: dict[str, Any] = {"window": 2, "pool": 3, "future": 5, "sinks": 1}


def test_needles_of_a_cache_without_the_keys() -> None:
    model, length = hw.load("tasks-4l"), 60
    twin: Any = copy.deepcopy(model.hf).double()
    twin.set_attn_implementation("eager")
    found = kv_needles(
        model, length, depths=2, material="tokens", kept="0.25, 0.75", seed=3, draws=2, **ASKED
    )
    for depth, (_, _, test) in enumerate(needles(model, [length], [0.0, 1.0], 1, "tokens", 3)):
        first, answer = test.question.start, test.ids[:, test.answer]
        ids = torch.cat([test.ids, answer], 1)
        scores = kv_scores(model, test.ids[:, :first], **ASKED)
        mine = found.isel(depth=depth, length=0)
        ours = {(None, 1): (mine.whole_loss, mine.whole_recall)}
        ours |= {
            (way, share): (mine.loss.sel(by=way, kept=share), mine.recall.sel(by=way, kept=share))
            for way in RULES
            for share in (0.25, 0.75)
        }
        for (way, share), (loss, recall) in ours.items():
            kept = None if way is None else kept_by_hand(scores.isel(batch=0), way, int(share * first))
            by_hand = loss_by_hand(twin, ids, first, kept)[-answer.shape[1] :].mean()
            best = logits_by_hand(twin, ids, first, kept)[-answer.shape[1] - 1 : -1].argmax(-1)
            np.testing.assert_allclose(loss, by_hand, rtol=1e-4)
            np.testing.assert_allclose(recall, (best == answer[0]).double().mean(), rtol=1e-12)
    assert found.whole_recall.min() == 1 > found.recall.max("by").min() > 0


def test_a_length_counts_once(one_head: hw.HookedModel) -> None:
    asked = {"material": "tokens", "kept": "0.5", "depths": 1, **ASKED}
    once, twice = (kv_needles(one_head, lengths, **asked) for lengths in ([40], [40, 40]))
    xr.testing.assert_equal(once, twice)
    with pytest.raises(AnalysisError, match="need a length"):
        kv_needles(one_head, [], **asked)


def test_a_text_that_is_too_long_is_refused(one_head: hw.HookedModel) -> None:
    with pytest.raises(AnalysisError, match="give lengths="):
        kv_needles(one_head, 2000, material="tokens", kept="0.5", **ASKED)
