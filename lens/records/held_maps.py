"""Small maps that wait, so that the statistics of many are computed at once: layers side by side, steps as rows.

The statistics of a map take some forty operations, whatever its size. Those of a few tokens cost more than the layer
that they are of, and a step of a generation has one row. Maps of one plain rule can wait: those of many layers are one
map of many heads, those of many steps one map of many rows. No number depends on how many wait but by rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.tiles.mask import Mask

SMALL = 2**17  # pairs of a map whose layer costs less than the operations of its statistics
TOGETHER = 2**20  # pairs of the maps that wait for each other
STEPS = 64  # that wait for each other


def is_plain(map: AttentionMap) -> bool:
    """Whether the weights follow from scaled products, a band with padding and the log-sum-exp alone."""
    rule, mask = map.rule, map.rule.mask
    nothing = rule.bias is None and rule.alibi is None and rule.softcap is None and rule.normaliser is None
    band = mask.extra is None and mask.documents is None
    return nothing and band and not (rule.edits or map.steps or map.known)


def waits(map: AttentionMap) -> bool:
    """Whether a layer's map can wait for others."""
    return math.prod(map.shape) <= SMALL and is_plain(map)


def fits(map: AttentionMap, first: AttentionMap, count: int) -> bool:
    """Whether a map that can wait fits beside the `count` that wait, of which the first is given."""
    small = math.prod(map.shape) * (count + 1) <= TOGETHER
    return small and _alike(map, first) and _same_mask(map.mask, first.mask)


def repeats(map: AttentionMap, first: AttentionMap, count: int) -> bool:
    """Whether a map has the very rule and form of the first of `count` that wait, so that it waits beside them."""
    if map.rule is not first.rule or map.steps or map.known:
        return False
    alike = map.q.shape == first.q.shape and map.k.shape == first.k.shape and map.q.dtype == first.q.dtype
    return alike and map.backend == first.backend and math.prod(map.shape) * (count + 1) <= TOGETHER


def beside(maps: Sequence[AttentionMap]) -> AttentionMap:
    """The maps of some layers as one map of all their heads; a learned sink is in their log-sum-exp."""
    first = maps[0]
    q, k, lse = (torch.cat(each, 1) for each in zip(*((m.q, m.k, m.lse) for m in maps), strict=True))
    return AttentionMap(q, k, replace(first.rule, sinks=None), lse, (), first.backend)


def apart(found: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Statistics of maps that stood side by side, [batch, head of all, …], as [batch, layer, head, …]."""
    return {name: values.unflatten(1, (layers, -1)) for name, values in found.items()}


class Steps:
    """Steps of a generation that follow each other, with the keys of the last one, which hold those of all."""

    def __init__(self) -> None:
        self.last: AttentionMap | None = None
        self.value: Tensor | None = None  # [batch, kv head, key, d_value] of the last step
        self._first = 0
        self._rows: list[
            tuple[Tensor, Tensor, Tensor | None]
        ] = []  # queries, log-sum-exp, which are no padding

    def takes(self, map: AttentionMap) -> bool:
        """Whether the map of a step can wait below those that wait already."""
        mask, last = map.rule.mask, self.last
        one = mask.queries == 1 and mask.key_offset == 0 and mask.keys == mask.query_offset + 1
        if not one or mask.left is not None or mask.right not in (None, 0) or not is_plain(map):
            return False
        if last is None:
            return True
        follows = mask.query_offset == last.rule.mask.query_offset + 1
        return follows and len(self._rows) < STEPS and _alike(map, last) and _same_keys(mask, last.rule.mask)

    def add(self, map: AttentionMap, value: Tensor) -> None:
        if self.last is None:
            self._first = map.rule.mask.query_offset
        self.last, self.value = map, value
        self._rows.append((map.q, map.lse, map.rule.mask.valid_queries))

    def below(self) -> AttentionMap:
        """The steps as one map of some rows."""
        last, rows = self.last, self._rows
        assert last is not None
        valid = None
        if any(real is not None for _, _, real in rows):
            every = torch.ones(len(last.q), 1, dtype=torch.bool)
            valid = torch.cat([every if r is None else r.cpu().expand_as(every) for _, _, r in rows], 1)
        mask = replace(last.mask, queries=len(rows), query_offset=self._first, right=0, valid_queries=valid)
        q, lse = (torch.cat(each, 2) for each in list(zip(*rows, strict=True))[:2])
        return AttentionMap(q, last.k, replace(last.rule, mask=mask, sinks=None), lse, (), last.backend)


def _alike(a: AttentionMap, b: AttentionMap) -> bool:
    """Whether two maps have one scale, one form of queries and keys, and one backend."""
    # compared one by one, as a generation asks this of every layer at every step
    q, k, other_q, other_k = a.q, a.k, b.q, b.k
    kinds = q.dtype == other_q.dtype and q.device == other_q.device and a.lse.dtype == b.lse.dtype
    if not kinds or a.rule.scale != b.rule.scale or a.backend != b.backend or k.shape[1] != other_k.shape[1]:
        return False
    shape, other = q.shape, other_q.shape
    return shape[:2] == other[:2] and shape[3] == other[3]


def _same_keys(mask: Mask, before: Mask) -> bool:
    """Whether a step hides no key that the step before it saw, and shows none that it hid."""
    now, then = mask.valid_keys, before.valid_keys
    if now is None or then is None:
        return now is then
    return now.shape[1] == then.shape[1] + 1 and bool((now[:, :-1] == then).all())


def _same_mask(a: Mask, b: Mask) -> bool:
    """Whether two masks are the same object, or bands without padding that hide the same pairs."""
    if a is b:
        return True
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Mask)]
    return not any(isinstance(x, Tensor) for pair in pairs for x in pair) and all(x == y for x, y in pairs)
