"""A fixture by which an element that nothing writes is seen."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised tensor begins as NaN, or as the smallest integer."""
    allocate = torch.empty

    def empty(*size, **options):
        made = allocate(*size, **options)
        return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).min)

    monkeypatch.setattr(torch, "empty", empty)
