"""Packed rows: attention within chunks of one long row, as towers have it that read images of any size (Qwen-VL).

transformers' modules split such a row at `cu_seqlens` and call the attention function once for each chunk, so that a
layer has many maps. A hook gives the module the row as one chunk. The boundaries reach the attention function in a
context variable and become the documents of one mask, which hides the same pairs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.attention.context import NAME
from headwater.lens.attention.module_hooks import Given, Lasting, stay

BOUNDARIES = "cu_seqlens"  # where each chunk begins, and the end of the last one
_chunks: ContextVar[tuple[nn.Module, Tensor] | None] = ContextVar("headwater_chunks", default=None)


def read_whole(modules: Iterable[nn.Module]) -> bool:
    """Let modules that take boundaries call the attention function once for the whole row; whether any is new to it."""
    return stay([module for module in modules if _takes_boundaries(module)], _AsOneChunk())


def documents(module: nn.Module, length: int) -> Tensor | None:
    """The chunk of each position, int64 [1, position], in the call of this module that runs; None without chunks."""
    found = _chunks.get()
    if found is None or found[0] is not module or found[1].shape[1] != length:
        return None
    return found[1]


def _takes_boundaries(module: nn.Module) -> bool:
    return BOUNDARIES in inspect.signature(module.forward).parameters


class _AsOneChunk(Lasting):
    """The hook; it does nothing while the module runs another attention function."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        _chunks.set(None)
        if getattr(getattr(module, "config", None), "_attn_implementation", None) != NAME:
            return None
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        bounds = given.arguments.get(BOUNDARIES)
        if bounds is None:
            return None
        lengths = (bounds[1:] - bounds[:-1]).cpu()
        if len(lengths) > 1:
            _chunks.set((module, torch.arange(len(lengths)).repeat_interleave(lengths)[None]))
        given.arguments[BOUNDARIES] = bounds[[0, -1]]
        return given.args, given.kwargs
