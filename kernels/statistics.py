"""Exact statistics of attention maps, streamed over blocks of rows: every one in one pass, in linear memory.

Conventions. Statistics are of the weights that multiply the values, after edits, as they are: where a head has a
learned sink its rows sum to less than 1 (`row_mass`) and nothing is renormalised. Rows that are padding or see no key
hold NaN (`argmax`: -1) and take no part in column statistics. Weights are without unit; `lse` and `entropy` are in
nats, `distance` in tokens, `visible` in queries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwater.kernels import blocked

if TYPE_CHECKING:
    from headwater.kernels.operator import AttentionMap

ROW = {
    "lse": "log-sum-exp of the row's scores, with the learned sink (nats)",
    "entropy": "-sum of w ln w over the row (nats)",
    "max": "largest weight of the row",
    "argmax": "column of the largest weight, the first of equals",
    "self": "weight on the row's own position",
    "previous": "weight on the position before",
    "first": "weight on the first visible key",
    "distance": "sum of w times |query - key| (tokens)",
    "row_mass": "sum of the row's weights: 1, or less with a learned sink",
}
COLUMN = {
    "received": "sum of the weights that queries put on the key",
    "visible": "how many queries see the key",
    "sink": "received / visible: the share of their attention that the queries which see the key give it",
}
GROUPED = {"mass": "weight on each named group of keys"}
NAMES = (*ROW, *COLUMN, *GROUPED)
# what costs nothing beyond the forward pass
FREE = ("lse", "visible")


def compute(map: AttentionMap, names: Iterable[str], groups: Tensor | None = None) -> dict[str, Tensor]:
    """The named statistics of one layer's maps.

    Row statistics come as [batch, head, query], column statistics as [batch, head, key], `mass` as
    [batch, head, group, query]; float32, but int64 for `argmax` and `visible`. `groups` is bool [group, key] or
    [batch, group, key].
    """
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"unknown statistics {unknown}; there are {', '.join(NAMES)}")
    if "mass" in names and groups is None:
        raise ValueError("the statistic 'mass' needs groups of keys")
    batch, heads, queries, keys = map.shape
    found: dict[str, Tensor] = {}
    wanted = names
    if "sink" in names:
        names = list(dict.fromkeys([*(n for n in names if n != "sink"), "received", "visible"]))
    if "visible" in names:
        found["visible"] = map.rule.mask.seen_by(batch, heads).expand(batch, heads, keys).clone()
    if "lse" in names:
        found["lse"] = torch.where(torch.isinf(map.lse), torch.nan, map.lse).float()
    streamed = [name for name in names if name not in FREE]
    for name in streamed:
        shape = {"received": (batch, heads, keys)}.get(name, (batch, heads, queries))
        if name == "mass":
            assert groups is not None
            groups = groups[None] if groups.dim() == 2 else groups
            shape = (batch, heads, groups.shape[1], queries)
        found[name] = torch.zeros(shape, dtype=torch.long if name == "argmax" else torch.float32)
    if streamed:
        _stream(map, streamed, groups, found)
    silent = torch.isinf(map.lse).cpu()
    for name in streamed:
        if name == "argmax":
            found[name].masked_fill_(silent, -1)
        elif name == "mass":
            found[name].masked_fill_(silent[:, :, None], torch.nan)
        elif name != "received":
            found[name].masked_fill_(silent, torch.nan)
    if "sink" in wanted:
        found["sink"] = found["received"] / torch.where(found["visible"] > 0, found["visible"], torch.nan)
    return {name: found[name] for name in wanted}


def _stream(map: AttentionMap, names: list[str], groups: Tensor | None, found: dict[str, Tensor]) -> None:
    mask = map.rule.mask
    batch, heads = map.shape[:2]
    first = mask.first_visible(batch, heads).expand(batch, heads, -1) if "first" in names else None
    for block in blocked.blocks(batch, range(heads), map.rule):
        weights = map.block(block)
        where = (block.batch, block.heads, block.rows)
        for name in names:
            if name == "received":
                found[name][block.batch, block.heads, block.columns] += weights.sum(-2).float().cpu()
            elif name == "mass":
                assert groups is not None
                inside = (groups if len(groups) == 1 else groups[block.batch])[:, :, block.columns].to(
                    weights
                )
                mass = torch.einsum("bhqk,bgk->bhgq", weights, inside.expand(len(weights), -1, -1))
                found[name][block.batch, block.heads, :, block.rows] = mass.float().cpu()
            elif name in ("max", "argmax"):
                if weights.shape[-1]:
                    top, place = weights.max(-1)
                    found[name][where] = (
                        top.float().cpu() if name == "max" else place.cpu() + block.columns.start
                    )
            else:
                found[name][where] = _row(name, weights, block, mask.shift, first).float().cpu()


def _row(name: str, weights: Tensor, block: blocked.Block, shift: int, first: Tensor | None) -> Tensor:
    if name == "entropy":
        return torch.special.entr(weights).sum(-1)
    if name == "row_mass":
        return weights.sum(-1)
    rows = torch.arange(block.rows.start, block.rows.stop, device=weights.device) + shift
    if name == "distance":
        columns = torch.arange(block.columns.start, block.columns.stop, device=weights.device)
        return (weights * (rows[:, None] - columns).abs()).sum(-1)
    if name == "self":
        place = rows.expand(weights.shape[:-1])
    elif name == "previous":
        place = (rows - 1).expand(weights.shape[:-1])
    else:
        assert name == "first"
        assert first is not None
        place = first[block.batch][:, block.heads, block.rows].to(weights.device)
    return _at(weights, place - block.columns.start)


def _at(weights: Tensor, place: Tensor) -> Tensor:
    """The weight at one column of each row, 0 where that column is outside of the block."""
    inside = (place >= 0) & (place < weights.shape[-1])
    if not weights.shape[-1]:
        return weights.new_zeros(place.shape)
    picked = weights.gather(-1, place.clamp(0, weights.shape[-1] - 1)[..., None])[..., 0]
    return torch.where(inside, picked, 0.0)
