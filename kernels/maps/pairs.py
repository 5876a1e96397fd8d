"""Exact weights on chosen (query, key) pairs: stripes at a fixed offset, induction pairs, any few columns per row.

A pair needs its own score and the row's saved log-sum-exp, `exp(s_ij - lse_i)`, so n columns of every row cost O(S·n·D)
and no pass over the map: a block whose columns are chosen row by row. Memory is the result and one such block.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwater.kernels.rules.map_state import MapState
from headwater.kernels.threads import mapped
from headwater.kernels.tiles.block import Block

GATHERED = 2**22  # numbers of k that are gathered at a time: 16 MB of float32


def stripe(map: MapState, offset: int) -> Tensor:
    """Weight of each query on the key `offset` positions before it, float32 [batch, head, query]; negative: after it.

    0 is the own position, 1 the previous one. 0 weight where there is no such key, where it is hidden and on rows of
    padding.
    """
    mask = map.mask
    column = torch.arange(mask.queries) + mask.shift - offset
    return at(map, column[:, None])[..., 0]


def at(map: MapState, columns: Tensor) -> Tensor:
    """Weights at `columns`, float32 [batch, head, query, n] on the map's device.

    `columns` is int64 [query, n], [batch, query, n] or [batch, head, query, n]. 0 where a column is outside of the keys
    (-1 says "none"), where it is hidden and on rows of padding.
    """
    columns = _four(map, columns)
    batch, heads, queries, keys = map.shape
    n, width = columns.shape[-1], map.q.shape[-1]
    found = torch.zeros(batch, heads, queries, n, device=map.q.device)
    if not found.numel() or not keys:
        return found
    taller = heads if columns.shape[1] > 1 else map.k.shape[1]
    step = max(GATHERED // (taller * n * width), 1)

    def of_rows(part: tuple[int, slice]) -> tuple[int, slice, Tensor]:
        b, rows = part
        place = columns[b : b + 1, :, rows]
        near = place.clamp(0, keys - 1)
        block = Block(slice(b, b + 1), torch.arange(heads), rows, slice(0, keys), near)
        inside = (place >= 0) & (place < keys)
        return b, rows, torch.where(inside, map.block(block), 0.0)[0].float()

    parts = [(b, slice(i, min(i + step, queries))) for b in range(batch) for i in range(0, queries, step)]
    for b, rows, weights in mapped(of_rows, parts, map.q.device):
        found[b, :, rows] = weights
    return found


def after_previous(
    ids: Int[Tensor, "batch position"], valid: Bool[Tensor, "batch position"] | None = None
) -> Int[Tensor, "batch position"]:
    """The column after the last earlier occurrence of the token at each position: where an induction head looks.

    -1 where the token is new or padding.
    `map.at(after_previous(ids)[..., None])` is the induction stripe. O(S log S), no pairs of positions.
    """
    length = ids.shape[1]
    order = ids.argsort(dim=1, stable=True)
    if valid is not None:
        # padding is no occurrence of anything: it is sorted behind all tokens
        order = order.gather(1, (~valid).gather(1, order).int().argsort(dim=1, stable=True))
    sorted_ids = ids.gather(1, order)
    same = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    if valid is not None:
        same = same & valid.gather(1, order)[:, 1:]
    following = torch.where(same, order[:, :-1] + 1, -1)
    found = torch.full_like(order, -1).scatter(1, order[:, 1:], following)
    if valid is not None and length:
        real = valid.gather(1, found.clamp_min(0))
        found = torch.where(real, found, -1)
    return found


def _four(map: MapState, columns: Tensor) -> Tensor:
    """`columns` as int64 [batch, head|1, query, n] on the map's device."""
    batch, heads, queries, _ = map.shape
    given = tuple(columns.shape)
    if columns.dim() == 2:
        columns = columns[None, None]
    elif columns.dim() == 3:
        columns = columns[:, None]
    fits = columns.dim() == 4 and columns.shape[2] == queries
    if not fits or columns.shape[0] not in (1, batch) or columns.shape[1] not in (1, heads):
        raise ValueError(
            f"columns must be [query, n], [batch, query, n] or [batch, head, query, n] with batch={batch}, "
            f"head={heads}, query={queries}; got {given}"
        )
    return columns.to(map.q.device, torch.long).expand(batch, -1, -1, -1)
