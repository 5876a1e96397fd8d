"""Rows in a temporary file are those in memory, along every axis. Seen to fail with the axis left where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headwater.lens.errors import RecordError
from headwater.lens.records.growing import Rows


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_what_memory_gives(axis: int, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = torch.randn(2, 5, 5, 5).to(dtype)
    held, written = Rows(axis, None), Rows(axis, tmp_path)
    for piece in whole.split([1, 3, 1], axis):
        held.append(piece)
        written.append(piece)
    assert held.length == written.length == 5
    assert held.joined().equal(whole)
    assert written.joined().equal(whole)
    assert not list(tmp_path.iterdir())


def test_a_piece_is_copied() -> None:
    piece, rows = torch.ones(1, 2), Rows(1, None)
    rows.append(piece)
    piece.zero_()
    assert rows.joined().equal(torch.ones(1, 2))


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"can not write in .*; give path="):
        Rows(0, tmp_path / "none").append(torch.ones(1))
