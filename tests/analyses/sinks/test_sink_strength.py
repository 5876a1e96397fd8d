"""Sink strength against sums over dense float64 maps, closed forms, and a generation told apart from its prompt.

Seen to fail: sinks of head 0 for every head; the transposed map; rows that see sinks alone counted in the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from ragged import padded

import headwater as hw
from headwater.analyses.sinks.find_sinks import find_sinks
from headwater.analyses.sinks.sink_strength import sink_strength
from headwater.lens.errors import AnalysisError


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gpt_oss", "bert"])
def test_strength_is_the_sum_over_dense_maps(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    ids, mask = padded(side="left" if name == "gpt2" else "right")
    maps = pair.maps(ids, mask)
    record = pair.model.record(ids, attention_mask=mask)
    cases: tuple[tuple[Literal["share"] | None, float | None], ...] = ((None, None), ("share", 0.25))
    for rule, threshold in cases:
        found = sink_strength(record, keys=[0, 2], rule=rule, threshold=threshold)
        for b, kept in enumerate(mask.bool()):
            place = kept.nonzero()[:, 0]
            dense = maps[:, b][..., place[:, None], place].numpy()
            sinks = np.zeros((3, 4, len(place)), bool)
            sinks[..., [0, 2]] = True
            if rule is not None:
                sinks = find_sinks(record, threshold=threshold).sink.values[b][..., place]
                assert sinks.any()
            strength = (dense * sinks[:, :, None]).sum(-1)
            np.testing.assert_allclose(found.strength.values[b][..., place], strength, atol=3e-6)
            seen = dense > 0
            level = (seen & sinks[:, :, None]).sum(-1) / seen.sum(-1)
            np.testing.assert_allclose(found.even.values[b][..., place], level, atol=1e-6)
            assert np.isnan(found.strength.values[b][..., ~kept.numpy()]).all()
        use = (found.even < 0.999).values
        text = [
            np.where(row.any(-1), np.nansum(np.where(row, value, 0), -1) / np.maximum(row.sum(-1), 1), np.nan)
            for row, value in zip(use, found.strength.values, strict=True)
        ]
        np.testing.assert_allclose(found["mean"].sel(part="all"), np.nanmean(text, 0), rtol=1e-5)


def test_pure_sink_and_uniform(pure_sink: hw.HookedModel, uniform: hw.HookedModel) -> None:
    ids = torch.randint(3, 61, (1, 10), generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(sink_strength(pure_sink.record(ids)).strength, 1.0, rtol=1e-5)
    even = sink_strength(uniform.record(ids))
    np.testing.assert_allclose(
        even.strength, np.broadcast_to(1 / np.arange(1, 11), even.strength.shape), rtol=1e-5
    )
    np.testing.assert_allclose(even.strength, even.even, rtol=1e-5)
    # query 0 sees the sink alone and is left out: the mean of 1/2 … 1/10
    np.testing.assert_allclose(even["mean"], (1 / np.arange(2, 11)).mean(), rtol=1e-5)


def test_a_generation_is_told_from_its_prompt(pairs: Callable) -> None:
    model = pairs("llama").model
    ids = torch.randint(3, 61, (2, 6), generator=torch.Generator().manual_seed(0))
    made = model.generate(ids, max_new_tokens=4, record=True, groups="generated", eos_token_id=None)
    found = sink_strength(made.record)
    assert found.generated.values.tolist() == [[False] * 6 + [True] * 4] * 2
    again = sink_strength(model.record(made.output)).strength
    np.testing.assert_allclose(found.strength, again, atol=1e-5)
    np.testing.assert_allclose(
        found["mean"].sel(part="generated"), again.values[..., 6:].mean((0, -1)), rtol=1e-4
    )
    np.testing.assert_allclose(
        found["mean"].sel(part="prompt"), again.values[..., 1:6].mean((0, -1)), rtol=1e-4
    )


def test_one_token_and_massive_sinks(one_head: hw.HookedModel, pure_sink: hw.HookedModel) -> None:
    one = sink_strength(one_head.record(torch.tensor([[5]])))
    np.testing.assert_allclose(one.strength, 1.0)
    assert np.isnan(one["mean"]).all()
    record = pure_sink.record(torch.arange(3, 12)[None], keep=("qk", "residual"))
    found = sink_strength(record, rule="massive", threshold=5.5)
    np.testing.assert_allclose(found["mean"].sel(part="all"), 1.0, rtol=1e-5)
    with pytest.raises(AnalysisError, match="keys holds 12"):
        sink_strength(record, keys=12)
