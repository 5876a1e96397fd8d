"""Statistics of one piece of a map: sums over a row by distance, and single weights. Both walks over a map use them.

A piece is weights [..., row, column]. `ahead` is the position of its first row less that of its first column.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


def of_rows(
    weights: Tensor,
    names: Collection[str],
    ahead: int,
    one_sided: bool,
    window: int,
    scratch: Tensor | None = None,
) -> dict[str, Tensor]:
    """The named statistics that are sums by distance or lie on a diagonal, each [..., row]; other names are ignored.

    `one_sided`: no key of the piece that has weight lies ahead of its query. `window` is where `windowed_distance`
    clips (tokens). `scratch`, of the size of the weights, is written over.
    """
    numbers = torch.arange(max(weights.shape[-2:]), device=weights.device, dtype=weights.dtype)
    rows, columns = (numbers[:n] for n in weights.shape[-2:])
    found: dict[str, Tensor] = {}
    if "row_mass" in names or ("distance" in names and one_sided):
        found["row_mass"] = weights.sum(-1)
    if "distance" in names and one_sided:
        # |query - key| is their difference, which is linear in the key
        found["distance"] = weights @ (ahead - columns) + rows * found["row_mass"]
    by_distance = {"distance_squared", "windowed_distance", *(() if one_sided else ("distance",))} & set(
        names
    )
    if by_distance:
        apart = (rows[:, None] + ahead - columns).abs()
        if "distance" in by_distance:
            found["distance"] = torch.mul(weights, apart, out=scratch).sum(-1)
        if "windowed_distance" in by_distance:
            found["windowed_distance"] = torch.mul(weights, apart.clamp(max=window), out=scratch).sum(-1)
        if "distance_squared" in by_distance:
            # not from sums of key and key²: on a row that looks nearby their difference would lose all digits
            found["distance_squared"] = torch.mul(weights, apart.square_(), out=scratch).sum(-1)
    for name, offset in (("self", ahead), ("previous", ahead - 1)):
        if name in names:
            found[name] = _diagonal(weights, offset)
    return {name: values for name, values in found.items() if name in names}


def one_per_row(weights: Tensor, place: Tensor) -> Tensor:
    """The weight at one column of each row, `place` [..., row]; 0 where that column is outside of the piece."""
    if not weights.shape[-1]:
        return weights.new_zeros(place.shape)
    inside = (place >= 0) & (place < weights.shape[-1])
    picked = weights.gather(-1, place.clamp(0, weights.shape[-1] - 1)[..., None])[..., 0]
    return picked * inside.to(weights)


def _diagonal(weights: Tensor, offset: int) -> Tensor:
    """The weight `offset` columns right of each row's number, [..., row]; 0 where there is none."""
    rows, columns = weights.shape[-2:]
    first, last = max(-offset, 0), min(rows, columns - offset)
    if first >= last:
        return weights.new_zeros(weights.shape[:-1])
    return torch.nn.functional.pad(weights.diagonal(offset, -2, -1), (first, rows - last))
