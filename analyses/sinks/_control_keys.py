"""Keys drawn at random to stand beside sinks as a control: as many, of the same heads, among the keys that are none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def control_keys(sinks: Tensor, places: Sequence[int], seed: int, draw: int) -> Tensor:
    """As many keys that are no sinks for each head, bool as `sinks` [text, layer, head, key]; all where fewer.

    One order of a text's keys is drawn, for all its heads; `places` are the texts' numbers, on which with `seed` and
    `draw` it depends, and not on how texts are batched.
    """
    orders = [np.random.default_rng([seed, draw, place]).random(sinks.shape[-1]) for place in places]
    scores = torch.from_numpy(np.stack(orders))[:, None, None].masked_fill(sinks, torch.inf)
    rank = scores.argsort(-1).argsort(-1)
    return (rank < sinks.sum(-1, keepdim=True)) & ~sinks
