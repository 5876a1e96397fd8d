"""Heavy-hitter eviction (H2O, Zhang et al. 2023, from memory): a head keeps the keys that received most attention.

Each query attends to the kept keys and to its own. The weights of every key are summed over the queries. Then, among
the keys older than the `recent` latest ones, the `heavy` keys with the largest sums are kept; the others are evicted
for good. Cost: the scores of all pairs, one step per query over the keys that are kept, and a bool queries × keys table
per head; meant for prompts of a few thousand tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwater.kernels.edits import scores as kernel
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import HIDDEN
from headwater.lens.attention.context import Lowered
from headwater.lens.edits.base import HeadWise, LayerCall, Rows
from headwater.lens.errors import EditError
from headwater.lens.naming.heads import Heads, Layers
from headwater.lens.running import ids

__all__ = ["HeavyHitters"]

ROWS = 64  # queries whose scores are computed together


@dataclass(frozen=True, eq=False)
class HeavyHitters(HeadWise, counts={"heavy": 0, "recent": 1}, neutral={"heavy": None}):
    """Evict keys as in a cache of `heavy` heavy hitters and the `recent` latest tokens; `heavy=None` evicts none.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.HeavyHitters(heavy=1, recent=2)):
    ...     weights = model.record("Mary gave John a drink").pattern(2, 0)[0, -1]
    >>> int((weights > 0).sum())  # 1 heavy hitter, 2 recent keys, and the query's own
    4
    """

    heavy: int | None
    recent: int
    heads: Heads = "all"
    layers: Layers = "all"
    rows: Rows = "all"
    reads_tokens = True  # so that running/ids.py clears `memory` when a new run begins

    def _lower(self, call: LayerCall) -> Lowered:
        def adapt(
            q: Tensor, k: Tensor, rule: ScoreRule, weights: tuple[WeightEdit, ...]
        ) -> tuple[ScoreRule, tuple[WeightEdit, ...]]:
            kept = self._kept(call, q.detach(), k.detach(), rule)

            def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                there = query - rule.mask.query_offset, key - rule.mask.key_offset
                return kept.to(key.device)[batch, head, *there]

            return replace(rule, edits=(*rule.edits, kernel.MaskScores(call.heads, visible))), weights

        return Lowered(adapters=(adapt,))

    def _kept(self, call: LayerCall, q: Tensor, k: Tensor, rule: ScoreRule) -> Tensor:
        """The keys that each query still sees, bool [batch, head, query, key]."""
        if rule.normaliser is not None:
            raise EditError(
                f"HeavyHitters adds up softmax weights; take the normaliser {rule.normaliser.name!r} off"
            )
        mask, heads = rule.mask, torch.arange(q.shape[1])
        memory = ids.current(call.names.model.key).memory
        slot = ("heavy", id(self), call.layer)
        # memory counts absolute positions, because a sliding-window cache drops its oldest keys
        first, last = mask.key_offset, mask.key_offset + k.shape[2]
        cache = _Cache.empty(q, min(self.heavy or 0, last), last)  # no more places than keys
        if mask.query_offset:
            if slot not in memory:
                raise EditError(
                    "HeavyHitters: this run goes on from a cache that was filled without it; begin with the prompt"
                )
            cache = cache.after(memory[slot])
        found = torch.zeros(*q.shape[:2], mask.queries, k.shape[2], dtype=torch.bool, device=q.device)
        for begin in range(0, mask.queries, ROWS):
            rows = slice(begin, min(begin + ROWS, mask.queries))
            block = Block(slice(0, q.shape[0]), heads, rows, slice(0, k.shape[2]))
            scores = rule.scores(q, k, block)
            for row in range(rows.start, rows.stop):
                place = row + mask.query_offset
                latest = slice(max(place - self.recent, 0), first + mask.key_span(row, row + 1)[1])
                here = block._replace(rows=slice(row, row + 1))
                seen = cache.read(scores[:, :, row - begin], latest, first)
                cache.add(torch.exp(seen - _row_constant(rule, seen, here)).nan_to_num(0.0), latest, first)
                found[:, :, row, max(latest.start - first, 0) :] = True
                cache.mark(found[:, :, row], first)
                if place >= self.recent:
                    cache.age(place - self.recent)
        memory[slot] = cache
        return found


def _row_constant(rule: ScoreRule, seen: Tensor, row: Block) -> Tensor:
    return rule.row_constant(seen[:, :, None], row)[:, :, 0, None]


@dataclass(eq=False)
class _Cache:
    """The heavy hitters of each head, `places` and `sums` [batch, head, heavy], and `total` [batch, head, position] of
    the keys that are still recent. A free place is -1.
    """

    places: Tensor
    sums: Tensor
    total: Tensor

    @classmethod
    def empty(cls, q: Tensor, heavy: int, length: int) -> _Cache:
        shape = q.shape[:2]
        return cls(
            torch.full((*shape, heavy), -1, device=q.device),
            torch.full((*shape, heavy), -1.0, device=q.device, dtype=torch.float64),
            torch.zeros(*shape, length, device=q.device, dtype=torch.float64),
        )

    def after(self, earlier: _Cache) -> _Cache:
        """The cache of an earlier call, with room for the positions of this one."""
        for new, old in (
            (self.places, earlier.places),
            (self.sums, earlier.sums),
            (self.total, earlier.total),
        ):
            new[..., : old.shape[-1]] = old
        return self

    def read(self, scores: Tensor, latest: slice, first: int) -> Tensor:
        """Scores of the heavy hitters and of the latest keys, in float64; `first` is the position of column 0."""
        columns = self.places - first
        heavy = scores.gather(-1, columns.clamp_min(0)).masked_fill(columns < 0, HIDDEN)
        return torch.cat(
            [heavy, scores[..., max(latest.start - first, 0) : latest.stop - first]], -1
        ).double()

    def add(self, weights: Tensor, latest: slice, first: int) -> None:
        count = self.sums.shape[-1]
        self.sums += weights[..., :count]
        self.total[..., max(latest.start, first) : latest.stop] += weights[..., count:]

    def mark(self, row: Tensor, first: int) -> None:
        """Set the columns of the heavy hitters in a row [batch, head, key]."""
        columns = self.places - first
        row.scatter_(-1, torch.where(columns < 0, row.shape[-1] - 1, columns), True)

    def age(self, place: int) -> None:
        """The key at `place` is no longer recent: it takes the place of the weakest heavy hitter, or is evicted."""
        if not self.sums.shape[-1]:
            return
        entering = self.total[..., place, None]
        least, weakest = self.sums.min(-1, keepdim=True)
        stays = entering > least
        self.sums.scatter_(-1, weakest, torch.where(stays, entering, least))
        kept = torch.where(stays, place, self.places.gather(-1, weakest))
        self.places.scatter_(-1, weakest, kept)
