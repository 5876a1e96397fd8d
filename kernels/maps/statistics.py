"""Exact statistics of attention maps, streamed over blocks of rows: every one in one pass, in linear memory.

Conventions. Statistics are of the weights that multiply the values, after edits, as they are: where a head has a
learned sink, a normaliser other than the softmax or an edit that scales weights, its rows sum to what `row_mass` says
and nothing is renormalised: `distance` is then a sum and no mean, `entropy` that of no distribution (of r times a
distribution with the entropy H it is r·H - r·ln r), and `max` may exceed 1. Of signed weights sums are signed, `max`
is the largest, and `entropy` is refused. `of="shares"` measures |w| / (sum of |w| + 1e-8) of each row instead, which
is the proxy of Gu et al. 2025; `lse`, the logarithm of the row's denominator, and `visible` are the same for both.
Rows that are padding or see no key hold NaN (`argmax`: -1) and take no part in column statistics. Weights are without
unit; `lse` and `entropy` are in nats, `distance` and `windowed_distance` in tokens, `distance_squared` in tokens²,
`visible` in queries.

Cost: one pass for all that are asked for together, whatever their number; `lse` and `visible` need none, and `self`,
`previous` and `first` alone one product of a query and a key for each row. Plain softmax maps take the lean walk of
kernels/maps/softmax_statistics.py for what that has, or its compiled form of kernels/maps/compiled_statistics.py, and
this file's for the rest.
`distance_squared` and `windowed_distance` each add a multiplication per weight, so they are not in `DEFAULT`.
Column sums of some queries only, and weights on chosen pairs, are in kernels/maps/received.py and
kernels/maps/pairs.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from headwater.kernels.backends.choose import choose_for
from headwater.kernels.maps import compiled_statistics, pairs, softmax_statistics
from headwater.kernels.maps.measures import of_rows, one_per_row
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.threads import mapped
from headwater.kernels.tiles.block import Block

ROW = {
    "lse": "log-sum-exp of the row's scores, with the learned sink (nats)",
    "entropy": "-sum of w ln w over the row (nats)",
    "max": "largest weight of the row",
    "argmax": "column of the largest weight; of weights that only rounding tells apart, any",
    "self": "weight on the row's own position",
    "previous": "weight on the position before",
    "first": "weight on the first visible key",
    "distance": "sum of w times |query - key| (tokens)",
    "distance_squared": "sum of w times (query - key) squared (tokens²)",
    "windowed_distance": "sum of w times min(|query - key|, W), W = 10 unless given (tokens)",
    "row_mass": "sum of the row's weights: 1, less with a learned sink, any number under ScaleWeights",
}
COLUMN = {
    "received": "sum of the weights that queries put on the key",
    "visible": "how many queries see the key",
    "sink": "received / visible: the share of their attention that the queries which see the key give it",
}
GROUPED = {"mass": "weight on each named group of keys"}
NAMES = (*ROW, *COLUMN, *GROUPED)
# statistics that need the query's own position among the keys; cross-attention has none
RELATIVE = ("self", "previous", "distance", "distance_squared", "windowed_distance")
# what a record holds unless it is asked for something else: the rest costs more, or needs groups, or follows from these
DEFAULT = tuple(n for n in NAMES if n not in ("mass", "sink", "distance_squared", "windowed_distance"))
WINDOW = 10  # tokens at which `windowed_distance` clips, as in Li et al. 2025
# one weight of each row, on the key so far before it or the first it sees: alone they need no pass over the map
OF_PAIRS = {"self": 0, "previous": 1, "first": -1}
# what costs nothing beyond the forward pass
FREE = ("lse", "visible")


def compute(
    map: MapState, names: Iterable[str], groups: Tensor | None = None, window: int = WINDOW
) -> dict[str, Tensor]:
    """The named statistics of one layer's maps.

    Row statistics come as [batch, head, query], column statistics as [batch, head, key], `mass` as
    [batch, head, group, query]; float32, but int64 for `argmax` and `visible`. `groups` is bool [group, key] or
    [batch, group, key]; `window` is the W of `windowed_distance`, in tokens, 0 or more.
    """
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"unknown statistics {unknown}; there are {', '.join(NAMES)}")
    if window < 0:
        raise ValueError(f"the window of windowed_distance is 0 tokens or more; got {window}")
    if "mass" in names and groups is None:
        raise ValueError("the statistic 'mass' needs groups of keys")
    if "entropy" in names and map.signed:
        raise ValueError(
            "the entropy of weights that may be negative is not defined; ask for statistics of='shares' or leave it out"
        )
    batch, heads, queries, keys = map.shape
    found: dict[str, Tensor] = {}
    wanted = names
    if "sink" in names:
        names = list(dict.fromkeys([*(n for n in names if n != "sink"), "received", "visible"]))
    if "visible" in names:
        found["visible"] = map.mask.seen_by(batch, heads).expand(batch, heads, keys).clone()
    if "lse" in names:
        found["lse"] = torch.where(torch.isinf(map.lse), torch.nan, map.lse).float()
    # the forward pass clips at WINDOW
    usable = map.known.keys() - ({"windowed_distance"} if window != WINDOW else set())
    found |= {name: map.known[name].cpu() for name in names if name in usable}
    streamed = [name for name in names if name not in FREE and name not in found]
    if streamed and (there := choose_for(map).statistics(map, streamed, groups, window)) is not None:
        found |= {name: values.cpu() for name, values in there.items()}
        streamed = []
    if set(streamed) <= set(OF_PAIRS):
        found |= {name: _of_pairs(map, name) for name in streamed}
    walked: list[str] = []
    for name in streamed:
        shape = {"received": (batch, heads, keys)}.get(name, (batch, heads, queries))
        if name == "mass":
            assert groups is not None
            groups = groups[None] if groups.dim() == 2 else groups
            shape = (batch, heads, groups.shape[1], queries)
        if name not in found:
            found[name] = torch.zeros(shape, dtype=torch.long if name == "argmax" else torch.float32)
            walked.append(name)
    plain = bool(walked) and softmax_statistics.takes(map)
    lean = [name for name in walked if plain and name in softmax_statistics.NAMES]
    if lean:
        way = compiled_statistics if compiled_statistics.takes(map) else softmax_statistics
        way.stream(map, lean, found, window)
    if rest := [name for name in walked if name not in lean]:
        _stream(map, rest, groups, found, window)
    silent = torch.isinf(map.lse).cpu()
    for name in streamed if bool(silent.any()) else ():
        if name == "argmax":
            found[name].masked_fill_(silent, -1)
        elif name == "mass":
            found[name].masked_fill_(silent[:, :, None], torch.nan)
        elif name != "received":
            found[name].masked_fill_(silent, torch.nan)
    if "sink" in wanted:
        found["sink"] = found["received"] / torch.where(found["visible"] > 0, found["visible"], torch.nan)
    return {name: found[name] for name in wanted}


def _of_pairs(map: MapState, name: str) -> Tensor:
    """The weight on one key of each row, 0 where it has none, float32 [batch, head, query]."""
    if name == "first":
        return pairs.at(map, map.mask.first_visible(*map.shape[:2])[..., None])[..., 0].cpu()
    return pairs.stripe(map, OF_PAIRS[name]).cpu()


def _stream(
    map: MapState, names: list[str], groups: Tensor | None, found: dict[str, Tensor], window: int
) -> None:
    batch, heads = map.shape[:2]
    first = map.mask.first_visible(batch, heads).expand(batch, heads, -1) if "first" in names else None

    def of_block(block: Block) -> tuple[Block, dict[str, Tensor]]:
        return block, _of_block(map, block, names, groups, first, window)

    for block, values in mapped(of_block, map.row_blocks_of(), map.q.device):
        for name, some in values.items():
            some = some.to(found[name])
            if name == "mass":
                found[name][block.batch, block.heads, :, block.rows] = some
            elif name == "received":
                found[name][block.batch, block.heads, block.columns] += some
            else:
                found[name][block.batch, block.heads, block.rows] = some


def _of_block(
    map: MapState, block: Block, names: list[str], groups: Tensor | None, first: Tensor | None, window: int
) -> dict[str, Tensor]:
    """The statistics of a block's rows, and what its columns received from them."""
    weights, entropy = _weights(map, block, "entropy" in names)
    ahead = block.rows.start + map.mask.shift - block.columns.start
    one_sided = map.mask.right is not None and map.mask.right <= 0
    found = {"entropy": entropy} | of_rows(weights, names, ahead, one_sided, window)
    if "mass" in names:
        assert groups is not None
        inside = (groups if len(groups) == 1 else groups[block.batch])[:, :, block.columns].to(weights)
        found["mass"] = torch.einsum("bhqk,bgk->bhgq", weights, inside.expand(len(weights), -1, -1))
    if ("max" in names or "argmax" in names) and weights.shape[-1]:
        found["max"], place = weights.max(-1)
        found["argmax"] = place + block.columns.start
        if map.signed and weights.shape[-1] < map.shape[3]:
            # keys outside of the block have the weight 0, which may be the largest
            outside = block.columns.stop if block.columns.stop < map.shape[3] else 0
            found["argmax"] = torch.where(found["max"] < 0, outside, found["argmax"])
            found["max"] = found["max"].clamp_min(0)
    if first is not None:
        place = block.of_rows(first).to(weights.device) - block.columns.start
        found["first"] = one_per_row(weights, place)
    if "received" in names:
        found["received"] = weights.sum(-2)
    return {name: values for name, values in found.items() if name in names}


def _weights(map: MapState, block: Block, entropy: bool) -> tuple[Tensor, Tensor]:
    """Weights of a block and the entropy of its rows; before they are edited their logarithms are at hand."""
    if map.steps or not entropy:
        weights = map.block(block)
        if not entropy:
            return weights, weights.new_zeros(())
        # twice as fast as entr, and its slope is finite where a weight is 0
        return weights, -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(-1)
    logs = map.log_weights(block)
    weights = logs.exp()
    # a hidden pair would be 0 times -inf; where its weight is 0 any finite logarithm serves
    return weights, -torch.einsum("bhqk,bhqk->bhq", weights, logs.clamp(min=-1e4))
