"""What is kept of the steps of a generation so that the map of the whole text says what they said.

A step may see keys by another rule than the step before: images see themselves in the prompt and are followed causally,
a cache drops old keys. `StepMasks` joins the masks of all steps; `HeldRows` holds rows of the whole map to the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.tiles.mask import Mask
from headwater.lens.errors import RecordError

IN_PROMPT = 9  # rows of the prompt that are held
ROUNDING = 1e-3
AT_ONCE = 2**18  # weights between two rows that cost less than these rows one by one


@dataclass
class StepMasks:
    """The mask of the prompt, of the last step, and the first key that each row could see in its cache."""

    first: Mask | None = None
    last: Mask | None = None
    lowest: list[int] = field(default_factory=list)

    def add(self, mask: Mask) -> None:
        self.first = mask if self.first is None else self.first
        self.last = mask
        self.lowest += [mask.key_offset] * mask.queries

    def hiding(self, plain: Mask) -> Mask:
        """The mask of the whole text without the tokens that were removed in this layer: the last step hides them as
        keys, the prompt's step as queries."""
        first, last = self.first, self.last
        assert first is not None
        assert last is not None

        def joined(known: Tensor | None, more: Tensor | None, begin: int, count: int) -> Tensor | None:
            if more is None:
                return known
            more = torch.nn.functional.pad(more.cpu(), (begin, count - begin - more.shape[1]), value=True)
            return more if known is None else known & more

        keys = joined(plain.valid_keys, last.valid_keys, last.key_offset, plain.keys)
        return replace(
            plain,
            valid_keys=keys,
            valid_queries=joined(plain.valid_queries, first.valid_queries, 0, plain.queries),
        )

    def whole(self, plain: Mask) -> Mask:
        """The mask of all rows; `plain` is that of the last step, stretched over the whole text."""
        first, last = self.first, self.last
        assert first is not None
        assert last is not None
        alike = (first.left, first.right) == (last.left, last.right)
        if first is last or (alike and first.extra is None and last.extra is None and not self._drops(plain)):
            return plain
        rows, keys = first.query_offset + first.queries, first.key_offset + first.keys
        lowest = torch.tensor(self.lowest)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            early = query < rows
            seen = torch.where(
                early,
                (key < keys) & _seen(first, batch, head, query.clamp(max=rows - 1), key.clamp(max=keys - 1)),
                _seen(last, batch, head, query, key),
            )
            return seen & (key >= lowest.to(key.device)[query])

        left, right = (first.left, first.right) if alike else (None, None)
        return replace(plain, left=left, right=right, extra=visible)

    def _drops(self, plain: Mask) -> bool:
        """Whether the cache had dropped keys that the plain mask would show."""
        for row, low in enumerate(self.lowest):
            if low <= max(0, row - plain.left if plain.left is not None else 0):
                continue
            # documents are runs of positions, so the nearest key that was dropped speaks for all before it
            runs = plain.documents
            if runs is None or bool((runs[:, row] == runs[:, low - 1]).any()):
                return True
        return False


def _seen(mask: Mask, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Visibility by the band and the function of one step."""
    seen = torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool, device=key.device)
    if mask.left is not None:
        seen = seen & (key >= query - mask.left)
    if mask.right is not None:
        seen = seen & (key <= query + mask.right)
    return seen if mask.extra is None else seen & mask.extra(batch, head, query, key)


@dataclass
class HeldRows:
    """Numbers of a few rows as their step gave them: of the prompt, of steps 1, 2, 4, 8 …, and of the last step."""

    rows: dict[int, Tensor] = field(default_factory=dict)
    steps: int = 0
    latest: AttentionMap | None = None

    def add(self, map: AttentionMap) -> None:
        self.latest = map
        if self.steps & (self.steps - 1) == 0:
            self._keep(map)
        self.steps += 1

    def _keep(self, map: AttentionMap) -> None:
        first, count = map.rule.mask.query_offset, map.shape[2]
        rows = sorted(
            {round(place) for place in torch.linspace(0, count - 1, min(count, IN_PROMPT)).tolist()}
        )
        told = _numbers(map, rows, map.rule.mask.key_offset)
        self.rows |= {first + row: told[:, :, n] for n, row in enumerate(rows)}

    def hold(self, layer: int, map: AttentionMap) -> None:
        """RecordError if the map of the whole text has other rows than the steps had."""
        if self.latest is not None:
            self._keep(self.latest)
        if not self.rows:
            return
        rows = sorted(self.rows)
        found = _numbers(map, rows, 0)
        for n, row in enumerate(rows):
            apart, told = found[:, :, n], self.rows[row]
            if not torch.allclose(apart, told, atol=ROUNDING, rtol=ROUNDING):
                raise RecordError(
                    f"layer {layer}: in the step that read position {row} attention was another than the map of the "
                    f"whole text says (off by {float((apart - told).abs().max()):.2g}), so no one map holds it; use "
                    "keep=() for statistics alone, or record the finished text with model.record(…)"
                )


def _numbers(map: AttentionMap, rows: list[int], offset: int) -> Tensor:
    """Sum, sum of squares and mean key of the weights of some rows, [batch, head, row, 3] in float64."""
    keys = slice(0, map.shape[3])
    tiles = [
        map.tile(slice(run[0], run[-1] + 1), keys)[:, :, [row - run[0] for row in run]]
        for run in _runs(rows, AT_ONCE // max(math.prod(map.shape) // map.shape[2], 1))
    ]
    weights = (tiles[0] if len(tiles) == 1 else torch.cat(tiles, 2)).double().cpu()
    place = torch.arange(offset, offset + weights.shape[-1], dtype=torch.float64)
    position = 1 + map.rule.mask.query_offset + torch.tensor(rows, dtype=torch.float64)[:, None]
    centre = (weights * (place / position)).sum(-1)
    return torch.stack([weights.sum(-1), weights.square().sum(-1), centre], -1)


def _runs(rows: list[int], most: int) -> list[list[int]]:
    """The rows in runs, each from its first row to its last no longer than `most` rows."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row - runs[-1][0] < most:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs
