"""Masks by rule: which pairs of a query and a key are visible, as a function of their positions that is also data.

Each rule is called as `rule(batch, head, query, key)` with index tensors that broadcast together, absolute positions
among them, and gives True where the pair is visible. A tile asks for its own pairs alone, so that no queries × keys
tensor exists (but for `Listed`, which holds the one that was given). Places are counted from the first real token of
each row. The causal mask of a model stays on beside a rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POSITIVE = ("size", "sizes", "step", "window", "windows", "kernel")  # the settings that are at least 1
PLACES = ("starts", "document")  # the tensors of whole numbers; all others are bool


@dataclass(frozen=True, eq=False)
class PairRule:
    """Base of the rules; `starts` are the absolute positions of the first real query and the first real key.

    They are int64 [2, batch|1].
    """

    starts: Tensor

    def __post_init__(self) -> None:
        """ValueError where a size is no size, there are not as many sizes as axes, or a table holds something else."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.dtype != (torch.long if name in PLACES else torch.bool):
                kind = "whole numbers" if name in PLACES else "bool"
                raise ValueError(f"{name} must be {kind}; got {value.dtype}")
            numbers = value if isinstance(value, tuple) else (value,) if isinstance(value, int) else ()
            least = 1 if name in POSITIVE else 0
            if any(number < least for number in numbers):
                raise ValueError(f"{name} must be {least} or more; got {value}")
            if isinstance(value, tuple) and len(value) != len(vars(self)["sizes"]):
                raise ValueError(f"{name} must be a number for each of {vars(self)['sizes']}; got {value}")

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        starts = self.starts.to(batch.device)
        first = starts[:, batch] if starts.shape[1] > 1 else starts[:, torch.zeros_like(batch)]
        return self.seen(batch, head, query - first[0], key - first[1])

    def seen(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the pair of places is visible, bool broadcastable to all four."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Streaming(PairRule):
    """The first `sinks` keys, and the `window` latest, the query's own among them (StreamingLLM)."""

    sinks: int
    window: int

    def seen(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < self.sinks) | (query - key < self.window)


@dataclass(frozen=True, eq=False)
class Grouped(PairRule):
    """Keys of the query's own group of `size`; the first group begins at `-shift`.

    The first `sinks` tokens see all and are seen by all.
    """

    size: int
    shift: int
    sinks: int

    def seen(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        together = (query + self.shift) // self.size == (key + self.shift) // self.size
        return together | (key < self.sinks) | (query < self.sinks)


@dataclass(frozen=True, eq=False)
class Dilated(PairRule):
    """Keys a multiple of `step` away, at most `reach` such steps on either side (Longformer, Beltagy et al. 2020)."""

    reach: int
    step: int

    def seen(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        apart = (query - key).abs()
        return (apart % self.step == 0) & (apart <= self.reach * self.step)


@dataclass(frozen=True, eq=False)
class OnGrid(PairRule):
    """Base of the rules of a grid with `sizes` along its axes, the last one fastest; its first cell is place `first`.

    Tokens outside of the grid (a class token, registers, words) see all tokens and are seen by all.
    """

    first: int
    sizes: tuple[int, ...]

    def seen(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query, key = query - self.first, key - self.first
        cells = math.prod(self.sizes)
        inside = (query >= 0) & (query < cells) & (key >= 0) & (key < cells)
        seen, left = ~inside, cells
        together = torch.ones_like(seen)
        for axis, size in enumerate(self.sizes):
            left //= size
            together = together & self.along(axis, query // left % size, key // left % size)
        return seen | together

    def along(self, axis: int, query: Tensor, key: Tensor) -> Tensor:
        """Whether the pair is visible as far as this axis is concerned; its coordinates along the axis."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Windows(OnGrid):
    """Cells of the query's own window. `windows` are the windows' sizes; `shift` moves all of them along the axes.

    Shifted windows are cut off at the edges of the grid, as the mask of Swin's cyclic shift does (Liu et al. 2021).
    """

    windows: tuple[int, ...]
    shift: tuple[int, ...]

    def along(self, axis: int, query: Tensor, key: Tensor) -> Tensor:
        size, shift = self.windows[axis], self.shift[axis]
        return (query - shift) // size == (key - shift) // size


@dataclass(frozen=True, eq=False)
class Near(OnGrid):
    """Cells at most `reach` away along each axis; neighbourhoods are smaller at the edges of the grid."""

    reach: tuple[int, ...]

    def along(self, axis: int, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() <= self.reach[axis]


@dataclass(frozen=True, eq=False)
class Neighbourhood(OnGrid):
    """The `kernel` nearest cells along each axis, `step` apart; at an edge the neighbourhood is moved inside.

    Every cell sees as many (neighbourhood attention, Hassani et al. 2023, and its dilated form). `kernel * step` is at
    most the size of each axis.
    """

    kernel: tuple[int, ...]
    step: tuple[int, ...]

    def along(self, axis: int, query: Tensor, key: Tensor) -> Tensor:
        size, kernel, step = self.sizes[axis], self.kernel[axis], self.step[axis]
        # cells that are `step` apart form a line of their own, along which a neighbourhood is contiguous
        phase = query % step
        length = (size - phase + step - 1) // step
        begin = torch.minimum((query // step - kernel // 2).clamp_min(0), length - kernel)
        return (key % step == phase) & (key // step >= begin) & (key // step < begin + kernel)


@dataclass(frozen=True, eq=False)
class Tree(PairRule):
    """Keys of the query's own document and of its ancestors; tokens of no document see all and are seen by all.

    `document` [place] numbers the document of each place, -1 for none; `below[i, j]` says whether j is i or an ancestor
    of i. Places beyond the last belong to no document.
    """

    document: Tensor
    below: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.document) and int(self.document.max()) >= min(self.below.shape):
            raise ValueError(f"below must be [document, document], got {list(self.below.shape)}")

    def seen(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ours, theirs = (_looked_up(self.document, place, -1) for place in (query, key))
        outside = (ours < 0) | (theirs < 0)
        return outside | self.below.to(ours.device)[ours.clamp_min(0), theirs.clamp_min(0)]


@dataclass(frozen=True, eq=False)
class BlockList(PairRule):
    """Blocks of `size` keys by block of `size` queries: `shown[i, j]` is bool; pairs beyond the list are visible."""

    size: int
    shown: Tensor

    def seen(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _pairs(self.shown[None, None], batch, head, query // self.size, key // self.size)


@dataclass(frozen=True, eq=False)
class ChosenBlocks(PairRule):
    """Blocks of `size` keys chosen by each query: `chosen` is bool [batch, head, query, block].

    Its first query stands at the absolute position `offset`.
    """

    size: int
    offset: int
    chosen: Tensor

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        starts = self.starts.to(batch.device)
        first = starts[1][batch if starts.shape[1] > 1 else torch.zeros_like(batch)]
        return _pairs(self.chosen, batch, head, query - self.offset, (key - first) // self.size)


@dataclass(frozen=True, eq=False)
class Listed(PairRule):
    """The pairs of a given mask, bool [batch|1, head|1, query|1, key], by place; pairs beyond it are visible."""

    shown: Tensor

    def seen(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _pairs(self.shown, batch, head, query, key)


Rule = (
    Streaming | Grouped | Dilated | Windows | Near | Neighbourhood | Tree | BlockList | ChosenBlocks | Listed
)


def _looked_up(table: Tensor, place: Tensor, otherwise: int) -> Tensor:
    inside = (place >= 0) & (place < len(table))
    found = table.to(place.device)[place.clamp(0, len(table) - 1)]
    return torch.where(inside, found, otherwise)


def _pairs(table: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A table [batch|1, head|1, query|1, key] at these indices; True beyond its queries and keys."""
    table = table.to(key.device)
    rows, columns = table.shape[2:]
    query = torch.zeros_like(query) if rows == 1 else query
    inside = (query >= 0) & (query < rows) & (key >= 0) & (key < columns)
    batch, head = (
        torch.zeros_like(index) if size == 1 else index
        for index, size in ((batch, len(table)), (head, table.shape[1]))
    )
    return ~inside | table[batch, head, query.clamp(0, rows - 1), key.clamp(0, columns - 1)]
