"""`MaskPairs`: a query sees only the keys that a rule shows, or that a given [query, key] mask does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwater.kernels.edits import scores as kernel
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles import pair_rules
from headwater.kernels.tiles.heads import per_query_head
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.context import Lowered
from headwater.lens.edits.base import HeadWise, LayerCall, Prepared, Rows, starts
from headwater.lens.edits.named_positions import NO_GROUPS
from headwater.lens.edits.pair_settings import made_of, mask_of, settings_of
from headwater.lens.models.opened import Opened
from headwater.lens.naming.heads import Heads, Layers

__all__ = ["MaskPairs"]

NEEDS_NO_PLACE = ("blocks",)


@dataclass(frozen=True, eq=False)
class MaskPairs(HeadWise):
    """A query sees only the keys that `rule` shows, of those that the model's own mask shows; None hides nothing.

    `rule` is a mask, bool [query, key] or [head, query, key], counted from the first real token (pairs beyond it stay
    as they are), or a mapping with "kind" and the settings of that kind:

    - "dilated", `reach`, `step`: keys 0, step, 2·step … reach·step away, on both sides (Longformer).
    - "windows", `grid`, `size`, `shift=0`, `first=0`: its own window of the grid; shifted windows are cut at the edges,
      as in Swin.
    - "near", `grid`, `reach`, `first=0`: cells at most `reach` away along each axis.
    - "neighbourhood", `grid`, `size`, `step=1`, `first=0`: the `size` nearest cells along each axis, moved inside at an
      edge (NAT; with `step` its dilated form).
    - "tree", `documents`, `parents`: its own document [begin, end) and the ancestors of that; a parent is the number of
      an earlier document, or None. Tokens of no document see all and are seen by all.
    - "blocks", `size`, `shown`: the blocks of `size` keys that `shown[own block]` lists; others stay as they are.
    - "moba", `size`, `top`: its own block of `size` keys and, of the earlier ones, the `top - 1` whose mean key has the
      largest product with the query (MoBA, Lu et al. 2025).

    `grid` are the sizes of its axes, the last one fastest: frames, rows, columns. It begins at token `first`; both are
    known where the part reads pictures of the config's size. Tokens outside of the grid see all and are seen by all.
    Sizes on a grid are one number for all axes or one for each. Rules are evaluated tile by tile.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.Temperature(0.0), hw.MaskPairs({"kind": "dilated", "reach": 1, "step": 3})):  # uniform
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)
    tensor([0.0000, 0.0000, 0.5000, 0.0000, 0.0000, 0.5000])
    """

    rule: Any
    heads: Heads = "all"
    layers: Layers = "all"
    rows: Rows = "all"

    @property
    def own_position(self) -> bool:  # type: ignore[override]
        return isinstance(self.rule, Mapping) and self.rule.get("kind") not in NEEDS_NO_PLACE

    def _is_neutral(self) -> bool:
        return self.rule is None

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        prepared = super().prepare(model, groups)
        if self.rule is None:
            return prepared
        made = (
            made_of(settings_of(self.rule, model.parts[model.part_name].patches))
            if isinstance(self.rule, Mapping)
            else mask_of(self.rule, model.n_heads)
        )
        return replace(prepared, values=dict.fromkeys(prepared.heads, made))

    def _lower(self, call: LayerCall) -> Lowered:
        if isinstance(call.values, dict):
            return Lowered(adapters=(_Moba(call.heads, **call.values),))
        return Lowered(scores=(kernel.MaskScores(call.heads, call.values(starts(call.mask))),))


@dataclass(frozen=True, eq=False)
class _Moba:
    """The adapter that hides blocks by the queries and keys of the call."""

    heads: Tensor
    size: int
    top: int

    def __call__(
        self, q: Tensor, k: Tensor, rule: ScoreRule, weights: tuple[WeightEdit, ...]
    ) -> tuple[ScoreRule, tuple[WeightEdit, ...]]:
        mask = rule.mask
        chosen = chosen_blocks(q.detach(), k.detach(), mask, self.size, self.top)
        seen = pair_rules.ChosenBlocks(starts(mask), self.size, mask.query_offset, chosen)
        return replace(rule, edits=(*rule.edits, kernel.MaskScores(self.heads, seen))), weights


def chosen_blocks(q: Tensor, k: Tensor, mask: Mask, size: int, top: int) -> Tensor:
    """The blocks of `size` keys that each query keeps, bool [batch, head, query, block].

    They are its own block and those with the largest q·mean(k) of the others, `top` in all; behind a causal mask only
    earlier ones. Padding is in no mean.
    """
    query_start, key_start = starts(mask).to(q.device)
    place = torch.arange(mask.keys, device=q.device) + mask.key_offset - key_start[:, None]
    own = (torch.arange(mask.queries, device=q.device) + mask.query_offset - query_start[:, None]) // size
    block = torch.arange(max(-(-int(place.max() + 1) // size), 1), device=q.device)
    inside = place[:, None] // size == block[:, None]
    if mask.valid_keys is not None:
        inside = inside & mask.valid_keys[:, None].to(q.device)
    k = per_query_head(k, q.shape[1]).float()
    count = inside.sum(-1)[:, None]
    means = inside[:, None].to(k) @ k / count.clamp_min(1)[..., None]
    gate = (q.float() @ means.mT).masked_fill(count[:, :, None] == 0, -torch.inf)
    apart = (own[..., None] - block)[:, None]
    gate = gate.masked_fill((apart < 0) & (mask.right is not None), -torch.inf)
    gate = gate.masked_fill(apart == 0, torch.inf)
    best = gate.topk(min(top, len(block)), -1).indices
    return torch.zeros_like(gate, dtype=torch.bool).scatter(-1, best, True)
