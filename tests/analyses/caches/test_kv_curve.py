"""The loss with evicted keys against transformers' own cache, from which the keys were taken, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from evicted_by_hand import RULES, kept_by_hand, loss_by_hand

import headwater as hw
from headwater.analyses.caches._evicted_keys import Behind
from headwater.analyses.caches.kv_curve import kv_curve
from headwater.analyses.caches.kv_scores import kv_scores
from headwater.lens.errors import AnalysisError

LENGTH, FIRST = 20, 12
ASKED: dict[str, Any] = {"window": 2, "pool": 3, "future": 5, "sinks": 1}
IDS = torch.randint(3, 61, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_losses_of_a_cache_without_the_keys(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    found = kv_curve(pair.model, IDS, kept="0.5, 1", first=0.6, batch_size=2, **ASKED)
    scores = kv_scores(pair.model, IDS[:, :FIRST], **ASKED)
    apart = []
    for text in range(2):
        ids = IDS[text : text + 1]
        whole = float(loss_by_hand(pair.twin, ids, FIRST, None).mean())
        np.testing.assert_allclose(found.whole[text], whole, rtol=1e-5)
        np.testing.assert_allclose(found.loss.sel(kept=1)[:, text], whole, rtol=1e-5)
        for way in RULES:
            kept = kept_by_hand(scores.isel(batch=text), way, FIRST // 2)
            by_hand = float(loss_by_hand(pair.twin, ids, FIRST, kept).mean())
            np.testing.assert_allclose(found.loss.sel(by=way, kept=0.5)[text], by_hand, rtol=1e-5)
            apart.append(abs(by_hand - whole))
    np.testing.assert_allclose(found.excess, (found.loss - found.whole).mean("batch"))
    assert min(apart) > 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_text_that_is_read_again_gives_the_same(pairs: Callable, name: str) -> None:
    model = pairs(name).model
    kept = torch.rand(4, 3, model.n_kv_heads, FIRST, generator=torch.Generator().manual_seed(0)) < 0.4
    cached = Behind.of(model, IDS, FIRST)
    assert cached.known
    whole = cached.loss(torch.ones_like(kept))
    assert (cached.loss(kept) - whole).abs().min() > 1e-5
    torch.testing.assert_close(cached.loss(kept), Behind(model, IDS, FIRST).loss(kept), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole[2:], cached.loss(), rtol=1e-5, atol=1e-6)


def test_random_keys_follow_the_seed(one_head: hw.HookedModel) -> None:
    def drawn(seed: int, draws: int) -> Any:
        return kv_curve(one_head, IDS[:1], kept="0.3", first=0.6, seed=seed, draws=draws, **ASKED)

    one, other, both = drawn(0, 1), drawn(1, 1), drawn(0, 2)
    losses = [float(each.loss.sel(by="random").item()) for each in (one, drawn(0, 1), other, both)]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    least, largest = both.random_range[:, 0].values
    assert least < largest
    np.testing.assert_allclose(both.excess.sel(by="random").item(), (least + largest) / 2)


def test_what_is_refused(one_head: hw.HookedModel) -> None:
    with pytest.raises(AnalysisError, match=r"kept=0\.1 of 12 keys is less than window=2"):
        kv_curve(one_head, IDS, kept="0.1", first=0.6, **ASKED)
    with pytest.raises(AnalysisError, match="give shares above 0"):
        kv_curve(one_head, IDS, kept="0.5, two")
    with pytest.raises(AnalysisError, match="leaves no two tokens"):
        kv_curve(one_head, IDS, first=1.0, kept="0.5", **ASKED)
