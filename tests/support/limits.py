"""Limits of memory set low for a while, so that small inputs are computed in several pieces."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest

from headwater.kernels.backends import flash
from headwater.kernels.tiles import row_blocks


def block_elements(count: int) -> AbstractContextManager[None]:
    """Blocks of rows of at most so many elements of the map."""
    return mock.patch.object(row_blocks, "BLOCK_ELEMENTS", count)


def most_calls(count: int) -> AbstractContextManager[None]:
    """At most so many calls of the fused kernel for an edited map."""
    return mock.patch.object(flash, "MOST_CALLS", count)


def lower(monkeypatch: pytest.MonkeyPatch, module: str, **limits: Any) -> None:
    """Limits of one file, until the test ends: `lower(monkeypatch, "analyses.tokens.alti", LONGEST=5)`."""
    for name, value in limits.items():
        # the package may have a function of the module's name, so an attribute of it is not the module
        monkeypatch.setattr(importlib.import_module(f"headwater.{module}"), name, value)
