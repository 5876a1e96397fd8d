"""Swapped position embeddings against a copy of the model with its table's rows exchanged."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ragged import padded

import headwater as hw
from headwater.analyses.sinks.position_swap import _swapped, _table, position_swap
from headwater.lens.errors import AnalysisError


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_it_is_the_model_with_two_rows_exchanged(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(pair.twin)
    table = other.transformer.wpe if name == "gpt2" else other.bert.embeddings.position_embeddings
    with torch.no_grad():
        table.weight[[0, 4]] = table.weight[[4, 0]]
    found = position_swap(pair.model, ids, threshold=0.2)
    for version, twin in enumerate((pair.twin, other)):
        with torch.no_grad():
            maps = torch.stack(twin(ids, output_attentions=True).attentions, 1).numpy()
        for place, key in enumerate((0, 4)):
            seen = 9 - key if pair.causal else 9
            alpha = maps[..., key].sum(-1) / seen
            np.testing.assert_allclose(found.share[version, ..., place], alpha, atol=2e-6)
            np.testing.assert_allclose(found.rate[version, :, place], (alpha > 0.2).mean((1, 2)))
    assert not np.allclose(found.share[0], found.share[1], atol=1e-3)
    np.testing.assert_allclose(found["mean"], found.rate.mean("batch"))


def test_the_planted_sink_moves(pure_sink: hw.HookedModel) -> None:
    ids, mask = padded((9, 12, 7))
    rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    for length in {len(row) for row in rows}:
        given = torch.tensor([row for row in rows if len(row) == length])
        found = position_swap(pure_sink, given, first=0, second=4)
        np.testing.assert_array_equal(found.top.sel(version="plain"), 0)
        np.testing.assert_array_equal(found.top.sel(version="swapped"), 4)
        # scores are near 1,600, where neighbouring float32 numbers are 1.2e-4 apart
        np.testing.assert_allclose(found.share.sel(version="plain", key=0), 1.0, rtol=5e-4)
        np.testing.assert_allclose(found.share.sel(version="swapped", key=4), 1.0, rtol=5e-4)
        np.testing.assert_array_equal(found["mean"].sel(version="plain"), [1, 0])


def test_other_threads_see_nothing_of_it(pure_sink: hw.HookedModel) -> None:
    ids = torch.arange(3, 12)[None]
    before, seen = pure_sink(ids), []
    with _swapped(_table(pure_sink), 0, 4):
        thread = threading.Thread(target=lambda: seen.append(pure_sink(ids)))
        thread.start()
        thread.join()
        assert not torch.equal(pure_sink(ids), before)
    assert torch.equal(seen[0], before)
    assert torch.equal(pure_sink(ids), before)


def test_refusals(pairs: Callable) -> None:
    ids = torch.arange(3, 12)[None]
    with pytest.raises(
        AnalysisError, match="has rotary positions; positions are swapped in models such as GPT-2"
    ):
        position_swap(pairs("llama").model, ids)
    with pytest.raises(AnalysisError, match="the shortest has 9 tokens"):
        position_swap(pairs("gpt2").model, ids, second=9)
    with pytest.raises(AnalysisError, match="not two positions"):
        position_swap(pairs("gpt2").model, ids, second=0)
