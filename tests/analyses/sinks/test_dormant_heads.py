"""Resting heads against dense float64 maps and values.

Seen to fail: rows that see only the sink counted; the mean norm over all layers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ragged import padded

import headwater as hw
from headwater.analyses.sinks.dormant_heads import dormant_heads
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo


@pytest.mark.parametrize("name", ["gpt2", "mistral", "bert"])
def test_weights_and_norms_by_dense_maps(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    ids, mask = padded((9, 12, 1), side="left" if name == "mistral" else "right")
    maps = pair.maps(ids, mask).numpy()  # [layer, batch, head, query, key]
    record = pair.model.record(ids, attention_mask=mask, keep=("qkv", "residual"))
    found = dormant_heads(record, weight=0.15, norm=0.95)
    states = []
    for b, kept in enumerate(mask.bool().numpy()):
        place = kept.nonzero()[0]
        for layer in range(3):
            value = record.values[layer][b].double().numpy()[:, place]
            dense = maps[layer, b][:, place][..., place]
            z = dense @ np.repeat(value, 4 // len(value), 0)
            used = (dense[..., 1:] > 0).any(-1)  # sees a key besides the sink
            for h in range(4):
                if not used[h].any():
                    assert np.isnan(found.on_sinks[b, layer, h])
                    continue
                on_sinks = dense[h, used[h], 0].mean()
                lengths = [np.linalg.norm(z[g], axis=-1)[used[g]].mean() for g in range(4)]
                relative = lengths[h] / np.mean(lengths)
                np.testing.assert_allclose(found.on_sinks[b, layer, h], on_sinks, atol=1e-5)
                np.testing.assert_allclose(found.relative[b, layer, h], relative, rtol=1e-4)
                states.append((layer, on_sinks > 0.15, relative < 0.95, relative < 0.95 and on_sinks > 0.15))
    for which, rule in enumerate(("attention", "output", "both"), 1):
        np.testing.assert_allclose(found.share.sel(rule=rule), np.mean([s[which] for s in states]))
        for layer in range(3):
            share = np.mean([s[which] for s in states if s[0] == layer])
            np.testing.assert_allclose(found.layer_share.sel(rule=rule, layer=layer), share)
    assert 0 < found.share.sel(rule="both") < found.share.sel(rule="output")


def test_a_pure_sink_rests(pure_sink: hw.HookedModel) -> None:
    record = pure_sink.record(torch.arange(3, 15)[None], keep=("qkv", "residual"))
    assert dormant_heads(record).share.sel(rule="attention") == 1


def test_values_that_are_missing(one_head: hw.HookedModel) -> None:
    with pytest.raises(AnalysisError, match="no values; record with keep="):
        dormant_heads(one_head.record(torch.tensor([[5, 6]])))
    own = hw.load(zoo.build("gptj"))  # its own code computes its attention
    with pytest.raises(AnalysisError, match="shows no values"):
        dormant_heads(own.record(torch.tensor([[5, 6]]), keep=("qkv", "residual")))
