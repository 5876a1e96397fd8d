"""Spikes: channels of the streams of eager float64 twins, read by loops, and a planted one.

Seen to fail: the median over all activations in the place of that over channels; the fall a layer late.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ragged import padded
from streams_by_hand import KEEP, planted, streams

import headwater as hw
from headwater.analyses.sinks.activation_spikes import activation_spikes
from headwater.lens.errors import RecordError


@pytest.mark.parametrize("name", ["gpt2", "mistral", "bert"])
def test_channels_by_loops(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    ids, mask = padded(side="left" if name == "mistral" else "right")
    found = activation_spikes(pair.model.record(ids, attention_mask=mask, keep=KEEP), above=3)
    for b, kept in enumerate(mask.bool()):
        size, place = abs(streams(pair, ids[b], kept)), kept.nonzero()[:, 0].numpy()
        for layer in range(4):
            channels = size[layer].max(0)
            np.testing.assert_allclose(found.ratio[b, layer], channels.max() / np.median(channels), rtol=1e-5)
            assert found.channels[b, layer] == (channels > 3 * np.median(channels)).sum()
            token, channel = np.unravel_index(size[layer].argmax(), size[layer].shape)
            assert (found.position[b, layer], found.channel[b, layer]) == (place[token], channel)
            np.testing.assert_allclose(found.size[b, layer], size[layer].max(), rtol=1e-5)
            relative = size[layer, token] / np.sqrt((size[layer, token] ** 2).mean())
            np.testing.assert_allclose(found.near_zero[b, layer], (relative < 0.1).mean(), atol=1e-9)
        _, token, channel = np.unravel_index(size.argmax(), size.shape)
        path = size[:, token, channel]
        np.testing.assert_allclose(found.spike[b], path, rtol=1e-5, atol=1e-6)
        assert (found.spike_position[b], found.spike_channel[b]) == (place[token], channel)
        assert (found.rise[b], found.fall[b]) == (np.diff(path).argmax(), np.diff(path).argmin())
        assert found.plateau[b] == (path > path.max() / 2).sum()


def test_a_planted_spike() -> None:
    found = activation_spikes(planted())
    assert (found.rise.item(), found.fall.item(), found.plateau.item()) == (2, 21, 19)
    assert found.spike_channel.item() == 5
    assert found.massive.values[0].tolist() == [0] * 3 + [2] * 3 + [3] * 7 + [2] * 9 + [0] * 3
    assert found.channels[0, 3] == 1  # the other channel is about 50 medians


def test_one_token_and_what_is_missing(one_head: hw.HookedModel) -> None:
    ids = torch.tensor([[5]])
    assert np.isfinite(activation_spikes(one_head.record(ids, keep=KEEP)).ratio).all()
    with pytest.raises(RecordError, match="no residual stream"):
        activation_spikes(one_head.record(ids))
