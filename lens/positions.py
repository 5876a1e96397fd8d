"""Positions as a user names them: a number, a list, a range or slice, or "all", counted in real tokens of each row.

Position 0 is the first real token of a row, also where padding stands to its left; negative numbers count from its last
real token, so -1 is the prompt's last token, and in generation the token being read.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from headwater.kernels.mask import Mask
from headwater.lens.errors import EditError

Positions = str | int | slice | Iterable[int]


def check(positions: Positions, what: str) -> Positions:
    """A plain form of the positions (int, tuple, slice or "all"), or an EditError that names the field."""
    if isinstance(positions, str):
        if positions != "all":
            raise EditError(
                f"{what} are 'all', a position, a list or a slice of positions; got {positions!r}"
            )
        return positions
    if isinstance(positions, bool):
        raise EditError(f"{what} must be positions (whole numbers); got {positions!r}")
    if isinstance(positions, int | slice):
        return positions
    if isinstance(positions, range):
        return tuple(positions)
    found: tuple = (None,)
    if isinstance(positions, Iterable):
        found = tuple(positions.tolist() if isinstance(positions, Tensor) else positions)
    if not all(isinstance(p, int) and not isinstance(p, bool) for p in found):
        raise EditError(f"{what} must be positions (whole numbers); got {positions!r}")
    return found


def beyond(positions: Positions, length: int) -> list[int]:
    """The named positions that no prompt of `length` tokens has."""
    named = [positions] if isinstance(positions, int) else positions if isinstance(positions, tuple) else []
    return [p for p in named if p >= length or p < -length]


def of_row(positions: Positions, length: int) -> list[int]:
    """Positions from 0 of a row of `length` real tokens; the named ones that it lacks are left out."""
    if isinstance(positions, str):
        return list(range(length))
    if isinstance(positions, slice):
        return list(range(*positions.indices(length)))
    named = [positions] if isinstance(positions, int) else list(positions)
    return [p % length for p in named if -length <= p < length]


def select(positions: Positions, mask: Mask, axis: str) -> Tensor:
    """Chosen rows (`axis="query"`) or columns ("key") of a layer's maps, bool [batch|1, query or key]."""
    offset, count = (mask.query_offset, mask.queries) if axis == "query" else (mask.key_offset, mask.keys)
    start = torch.zeros(1, dtype=torch.long) if mask.start is None else mask.start.cpu()
    stop = torch.full_like(start, mask.query_offset + mask.queries) if mask.stop is None else mask.stop.cpu()
    picked = torch.zeros(len(start), count, dtype=torch.bool)
    for row, (first, last) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        columns = torch.tensor(of_row(positions, last - first), dtype=torch.long) + first - offset
        picked[row, columns[(columns >= 0) & (columns < count)]] = True
    return picked
