"""Limits of memory set low for a while, so that small inputs are computed in several pieces."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

from headwater.kernels.backends import flash_edits
from headwater.kernels.tiles import row_blocks


def block_elements(count: int) -> AbstractContextManager[None]:
    """Blocks of rows of at most so many elements of the map."""
    return mock.patch.object(row_blocks, "BLOCK_ELEMENTS", count)


def most_calls(count: int) -> AbstractContextManager[None]:
    """At most so many calls of the fused kernel for an edited map."""
    return mock.patch.object(flash_edits, "MOST_CALLS", count)
