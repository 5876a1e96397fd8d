"""`Grid`: where the patches of one picture or video stand on an axis of tokens, and which patch each token is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

PLACES = ("image", "frame", "row", "column")  # what says which patch a token is


class Grid(NamedTuple):
    """A picture whose first patch is token `start`, padding counted. Its patches stand row by row, frame after frame.

    `step` is the number of tokens from the beginning of one row of patches to the next: `columns`, or more where a
    token ends each row. With a `block` of 2 the patches stand square by square, 2 × 2 in each.

    >>> Grid(start=1, frames=1, rows=2, columns=3, step=3).tokens().tolist()
    [1, 2, 3, 4, 5, 6]
    >>> Grid(start=0, frames=1, rows=2, columns=4, step=4, block=2).tokens().tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """

    start: int
    frames: int
    rows: int
    columns: int
    step: int
    block: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, rows, columns)."""
        return self.frames, self.rows, self.columns

    @property
    def end(self) -> int:
        """The token behind the last patch."""
        return self.start + (self.frames * self.rows - 1) * self.step + self.columns

    def tokens(self) -> Int[Tensor, " patch"]:
        """The token of each patch, in the order frame, row, column."""
        frame, row, column = self.coordinates().T
        if self.block == 1:
            return self.start + (frame * self.rows + row) * self.step + column
        squares = (row // self.block) * (self.columns // self.block) + column // self.block
        within = row % self.block * self.block + column % self.block
        return self.start + frame * self.rows * self.columns + squares * self.block**2 + within

    def coordinates(self) -> Int[Tensor, "patch 3"]:
        """Frame, row and column of each patch, in the order of `tokens`."""
        return torch.cartesian_prod(*map(torch.arange, self.shape)).view(-1, 3)

    def names(self) -> list[str]:
        """ "row,column" of each patch, "frame,row,column" in a video, in the order of their tokens."""
        found = self.coordinates()[self.tokens().argsort()]
        return [",".join(map(str, place)) for place in (found if self.frames > 1 else found[:, 1:]).tolist()]


Grids = tuple[tuple[Grid, ...], ...]  # the pictures of each batch row


def places(grids: Grids, batch: int, count: int) -> Int[Tensor, "batch position 4"]:
    """Image, frame, row and column of each of `count` tokens, counted from 0; -1 where a token is no patch."""
    found = torch.full((batch, count, len(PLACES)), -1)
    for row, pictures in enumerate(grids):
        for number, grid in enumerate(pictures):
            tokens = grid.tokens()
            found[row, tokens, 0] = number
            found[row, tokens, 1:] = grid.coordinates()
    return found


def coordinates(grids: Grids, axis: str, columns: Int[Tensor, "batch asked"], count: int) -> dict[str, Any]:
    """Image, frame, row and column of the tokens in `columns`, of `count` on an axis, as coordinates of a result.

    There are none where no token is a patch, no image where there is one, and no frame where there is no video.
    """
    if not any(grids):
        return {}
    found = places(grids, len(columns), count)
    found = found.gather(1, columns[..., None].expand(-1, -1, len(PLACES))).numpy()
    kept = [
        n for n, name in enumerate(PLACES) if name in ("row", "column") or found[..., n].max(initial=0) > 0
    ]
    return {f"{axis}_{PLACES[n]}": (("batch", axis), found[..., n]) for n in kept}
