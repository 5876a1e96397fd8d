"""Random keys that are controls for sinks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def control_keys(sinks: Tensor, among: Tensor, places: Sequence[int], seed: int, draw: int) -> Tensor:
    """For each head as many keys that are not its sinks as it has sinks, or all such keys if there are fewer.

    `sinks` and the result are bool [text, layer, head, key]; `among`, bool [text, key], are the keys that may be drawn.
    All heads share one random order of a text's keys. It depends on `seed`, `draw` and the text's number in `places`,
    not on the batch.
    """
    without = sinks | ~among[:, None, None]
    return _drawn(sinks.sum(-1, keepdim=True), without, [(seed, draw, place) for place in places])


def half_of_others(sinks: Tensor, among: Tensor, places: Sequence[int], seed: int, draw: int) -> Tensor:
    """A random half (rounded up) of the keys `among` that are a sink of no head in the layer, for all heads alike."""
    anywhere = sinks.any(2, keepdim=True) | ~among[:, None, None]
    count = ((~anywhere).sum(-1, keepdim=True) + 1) // 2
    return _drawn(count, anywhere, [(seed, draw, place, 1) for place in places]).expand(sinks.shape)


def _drawn(count: Tensor, without: Tensor, seeds: Sequence[tuple[int, ...]]) -> Tensor:
    """`count` random keys outside of `without`, by one order for each text."""
    orders = np.stack([np.random.default_rng(seed).random(without.shape[-1]) for seed in seeds])
    scores = torch.from_numpy(orders)[:, None, None].masked_fill(without, torch.inf)
    return (scores.argsort(-1).argsort(-1) < count) & ~without
