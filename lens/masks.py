"""Masks from transformers, kept as what they mean instead of as tensors.

transformers composes a mask out of small functions of indices. The known ones (causal, bidirectional, sliding window)
are read off as a band; anything else stays a function that the kernels call tile by tile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from headwater.kernels.mask import IndexMask, Mask


@dataclass(frozen=True, eq=False)
class LazyMask:
    """What travels through a model in the place of a mask tensor."""

    mask: Mask


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> LazyMask:
    """transformers' mask contract; `attention_mask` is bool [batch, positions seen so far], True on real tokens."""
    q_offset, kv_offset = int(q_offset), int(kv_offset)
    left, right, extra = band(mask_function)
    if extra is not None:
        extra = _every(extra)
    valid_keys = valid_queries = start = stop = None
    if attention_mask is not None:
        real = attention_mask.bool().cpu()
        padded = torch.nn.functional.pad(real, (0, max(kv_offset + kv_length - real.shape[1], 0)))
        valid_keys = padded[:, kv_offset : kv_offset + kv_length]
        # in cross-attention the mask is of the keys alone; then lengths differ and the queries are taken as real
        if q_offset + q_length <= real.shape[1] and (right is not None or q_length == kv_length):
            valid_queries = real[:, q_offset : q_offset + q_length]
        if not real.all():
            start = real.long().argmax(-1)
            stop = real.shape[1] - real.flip(-1).long().argmax(-1)
        valid_keys = None if valid_keys.all() else valid_keys
        valid_queries = None if valid_queries is None or valid_queries.all() else valid_queries
    return LazyMask(
        Mask(
            q_length,
            kv_length,
            left,
            right,
            q_offset,
            kv_offset,
            valid_keys,
            valid_queries,
            extra,
            start,
            stop,
        )
    )


def band(function: Callable) -> tuple[int | None, int | None, IndexMask | None]:
    """`left`, `right` and what of the function no band expresses; checked against the function on sampled pairs."""
    parts = _parts(function)
    left: int | None = None
    right: int | None = None
    rest: list[Callable] = []
    for part in parts:
        limits = _limits(part)
        if limits is None:
            rest.append(part)
            continue
        left = _tighter(left, limits[0])
        right = _tighter(right, limits[1])
    if not rest and not _agrees(function, left, right):
        return None, None, function
    return left, right, masking_utils.and_masks(*rest) if rest else None


def _parts(function: Callable) -> list[Callable]:
    """The functions whose conjunction this is."""
    if getattr(function, "__qualname__", "") == "and_masks.<locals>.and_mask":
        inner = inspect.getclosurevars(function).nonlocals["mask_functions"]
        return [part for one in inner for part in _parts(one)]
    return [function]


def _limits(function: Callable) -> tuple[int | None, int | None] | None:
    """(left, right) of a known part; None where it is not known."""
    if function is masking_utils.causal_mask_function:
        return None, 0
    if function is masking_utils.bidirectional_mask_function:
        return None, None
    name = getattr(function, "__qualname__", "")
    if name == "sliding_window_overlay.<locals>.inner_mask":
        return inspect.getclosurevars(function).nonlocals["sliding_window"] - 1, None
    if name == "sliding_window_bidirectional_overlay.<locals>.inner_mask":
        window = inspect.getclosurevars(function).nonlocals["sliding_window"]
        return window, window
    return None


def _tighter(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _agrees(function: Callable, left: int | None, right: int | None) -> bool:
    """Guard against a transformers release that gives an old name a new meaning."""
    edges = {0, 1, *(abs(n) + d for n in (left or 0, right or 0) for d in (-1, 0, 1))}
    distance = torch.tensor(sorted({s * e for e in edges for s in (-1, 1)}))
    query = torch.full_like(distance, 2 * int(distance.abs().max()) + 2)
    key = query + distance
    zero = torch.zeros_like(query)
    expected = torch.ones_like(query, dtype=torch.bool)
    if right is not None:
        expected &= distance <= right
    if left is not None:
        expected &= -distance <= left
    return bool((function(zero, zero, query, key).expand_as(expected) == expected).all())


def _every(function: Callable) -> IndexMask:
    """The function over index tensors that broadcast, on the CPU or wherever they are."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return function(batch, torch.zeros_like(head[:, :1]), query, key)

    return visible
