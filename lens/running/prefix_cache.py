"""A key–value cache from which many runs can start after a shared prefix of the prompt.

It is transformers' `DynamicCache` with two differences: every layer keeps the keys of all positions, even if a sliding
window hides them, and a run adds nothing to it. So many runs can start from the same prefix, each with several copies
of the prompts in its batch. A cache of `growing` does take what runs add, in room that was made for it, so that a step
of a generation does not copy the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from headwater.lens.models.opened import Opened

KeysValues = Sequence[tuple[Tensor, Tensor]]  # by layer, [prompt, head, position, d]
Cache = DynamicCache


class _Held(DynamicLayer):
    """One layer: the keys and values of the prefix, repeated for each copy of the prompts; `update` does not store."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.held = keys, values, (keys, values)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return _behind(self.held[0], key_states), _behind(self.held[1], value_states)


class _Growing(DynamicLayer):
    """One layer: copies of the prefix, and room behind it that `update` fills."""

    def __init__(self, held: tuple[Tensor, Tensor], copies: int, more: int) -> None:
        super().__init__()
        self.length = held[0].shape[2]
        self.room = [_roomy(each, copies, more) for each in held]
        self.keys, self.values = (each[:, :, : self.length] for each in self.room)
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, self.length : end] = new
        self.keys, self.values = (each[:, :, :end] for each in self.room)
        self.length = end
        return self.keys, self.values


def _roomy(held: Tensor, copies: int, more: int) -> Tensor:
    prompts, heads, length, d = held.shape
    room = held.new_empty(prompts * copies, heads, length + more, d)
    room[:, :, :length] = held.repeat(copies, 1, 1, 1)
    return room


def _behind(held: Tensor, new: Tensor) -> Tensor:
    copies = held.expand(len(new) // len(held), *held.shape).flatten(0, 1)
    return torch.cat([copies, new], 2)


def empty(model: Opened) -> Cache | None:
    """An empty cache for a run to fill; None if the model carries more than keys and values between positions."""
    if not model.causal or getattr(model.hf, "_is_stateful", False):
        return None
    layers = DynamicCache(config=model.hf.config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return DynamicCache() if plain else None


def filled(cache: Cache | None, prompts: int, length: int) -> KeysValues:
    """Keys and values by layer of the first `prompts` rows after a run; [] if a layer does not hold all positions."""
    found = []
    for layer in [] if cache is None else cache.layers:
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            return []
        if layer.keys.shape[2] != length:
            return []
        found.append((layer.keys[:prompts], layer.values[:prompts]))
    return found


def before(known: KeysValues, position: int) -> Cache:
    """The cache for a run that starts at `position`."""
    cache = DynamicCache()
    cache.layers.extend(_Held(keys[:, :, :position], values[:, :, :position]) for keys, values in known)
    return cache


def growing(known: KeysValues, copies: int, more: int) -> Cache:
    """A cache of the whole prefix for `copies` copies of the prompts, which takes up to `more` further positions."""
    cache = DynamicCache()
    cache.layers.extend(_Growing(layer, copies, more) for layer in known)
    return cache
