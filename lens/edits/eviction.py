"""Heavy-hitter eviction (H2O, Zhang et al. 2023, from memory): a head keeps the keys that received most attention.

Each query attends to the kept keys and to its own. The weights of every key are summed over the queries. Then, among
the keys older than the `recent` latest ones, the `heavy` keys with the largest sums are kept; the others are evicted
for good. Cost: one step per query and a bool queries × keys table per head; meant for prompts of a few thousand tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwater.kernels.edits import scores as kernel
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import Block
from headwater.lens.attention.context import Lowered
from headwater.lens.edits.base import HeadWise, LayerCall, Rows
from headwater.lens.errors import EditError
from headwater.lens.naming.heads import Heads, Layers
from headwater.lens.running import ids

__all__ = ["HeavyHitters"]


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
        shape = (q.shape[0], q.shape[1], last)
        kept = torch.ones(shape, dtype=torch.bool, device=q.device)
        total = torch.zeros(shape, device=q.device, dtype=torch.float64)
        if mask.query_offset:
            if slot not in memory:
                raise EditError(
                    "HeavyHitters: this run goes on from a cache that was filled without it; begin with the prompt"
                )
            earlier, sums = memory[slot]
            kept[..., : earlier.shape[-1]], total[..., : sums.shape[-1]] = earlier, sums
        found = torch.empty(*shape[:2], mask.queries, k.shape[2], dtype=torch.bool, device=q.device)
        places = torch.arange(last, device=q.device)
        for row in range(mask.queries):
            seen = found[:, :, row] = kept[..., first:]
            rows, every = slice(row, row + 1), slice(0, k.shape[2])
            here = Block(slice(0, shape[0]), heads, rows, every)
            scores = rule.scores(q, k, here)[:, :, 0].double()
            scores = scores.masked_fill(~seen, float("-inf"))
            lse = rule.row_constant(scores[:, :, None], here)[:, :, 0, None]
            total[..., first:] += torch.exp(scores - lse).nan_to_num(0.0)
            kept = self._evicted(kept, total, places <= row + mask.query_offset - self.recent)
        read = mask.query_offset + mask.queries
        memory[slot] = (kept[..., :read], total[..., :read])
        return found

    def _evicted(self, kept: Tensor, total: Tensor, old: Tensor) -> Tensor:
        """The keys kept after one more query; `old` marks the keys before the recent window."""
        candidates = kept & old
        heavy = min(int(self.heavy or 0), kept.shape[-1])
        best = total.masked_fill(~candidates, -1.0).topk(heavy, -1).indices
        chosen = torch.zeros_like(kept).scatter(-1, best, True)
        return kept & ~(old & ~chosen)
