"""Variance of values against dense float64 maps and values.

Seen to fail: the variance of a sample and not of its values; keys of the wrong group of heads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ragged import padded

import headwater as hw
from headwater.analyses.sinks.value_variance import value_variance
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo


@pytest.mark.parametrize("name", ["gpt2", "mistral", "bert"])
def test_variances_by_dense_maps(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    ids, mask = padded((9, 12, 1), side="left" if name == "mistral" else "right")
    maps = pair.maps(ids, mask).numpy()  # [layer, batch, head, query, key]
    record = pair.model.record(ids, attention_mask=mask, keep=("qkv",))
    found = value_variance(record, keys=0)
    for b, kept in enumerate(mask.bool().numpy()):
        place = kept.nonzero()[0]
        for layer in range(3):
            value = record.values[layer][b].double().numpy()[:, place]
            value = np.repeat(value, 4 // len(value), 0)
            dense = maps[layer, b][:, place][..., place]
            seen = dense > 0
            z, even = dense @ value, (seen / seen.sum(-1, keepdims=True)) @ value
            for of, vectors in (("output", z), ("value", value), ("even", even)):
                spread = vectors.var(-1)
                np.testing.assert_allclose(found[of][b, layer][:, place], spread, rtol=2e-4, atol=1e-7)
                others = spread[:, 1:].mean(1) if len(place) > 1 else np.nan
                np.testing.assert_allclose(found.gap.sel(of=of)[b, layer], spread[:, 0] / others, rtol=3e-4)
        assert np.isnan(found.output[b][..., ~kept]).all()


def test_a_pure_sink_has_no_gap_in_its_outputs(pure_sink: hw.HookedModel) -> None:
    found = value_variance(pure_sink.record(torch.arange(3, 15)[None], keep=("qkv",)))
    np.testing.assert_allclose(found.gap.sel(of="output"), 1, rtol=1e-4)  # all gather the sink's value
    assert (found.gap.sel(of="even") > 1).all()


def test_values_that_are_missing(one_head: hw.HookedModel) -> None:
    with pytest.raises(AnalysisError, match=r"no values; record with keep=\('qkv',\)"):
        value_variance(one_head.record(torch.tensor([[5, 6]])))
    own = hw.load(zoo.build("gptj"))  # its own code computes its attention
    with pytest.raises(AnalysisError, match="shows no values"):
        value_variance(own.record(torch.tensor([[5, 6]]), keep=("qkv", "residual")))
