"""Where the patches of a picture stand among tokens. Seen to fail with rows that follow each other without a step."""

from __future__ import annotations

from headwater.lens.naming.grids import Grid, places


def test_a_grid_whose_rows_end_in_another_token() -> None:
    grid = Grid(start=3, frames=2, rows=2, columns=2, step=3)
    assert (grid.end, grid.tokens().tolist()) == (14, [3, 4, 6, 7, 9, 10, 12, 13])
    assert grid.names()[:5] == ["0,0,0", "0,0,1", "0,1,0", "0,1,1", "1,0,0"]


def test_each_token_knows_its_patch() -> None:
    found = places(((), (Grid(1, 1, 1, 2, 2), Grid(4, 1, 1, 1, 1))), 2, 6)
    assert found[0].eq(-1).all()
    assert found[1].tolist() == [[-1] * 4, [0, 0, 0, 0], [0, 0, 0, 1], [-1] * 4, [1, 0, 0, 0], [-1] * 4]
