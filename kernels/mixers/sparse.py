"""`SparseMap`: a map that lists the keys of each query, for attention over a graph and for deformable attention.

n listed keys per query cost O(S·n) memory, and a product O(S·n·c). `of_edges` is attention over the edges of a graph
(Veličković et al. 2018): a softmax over the neighbours of each node. `of_samples` is deformable attention (Zhu et al.
2021): each query reads a few points of feature grids, and a point between cells is read from the four around it in the
proportions of bilinear interpolation; what lies outside of the grid counts as 0, so rows may sum to less than 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.kernels.mixers.mixer_map import BLOCK_ELEMENTS
from headwater.kernels.mixers.weights_map import WeightsMap, entropy
from headwater.kernels.tiles.shapes import AtKeys, AtQueries, OverKeys, OverQueries, Weights


@dataclass(frozen=True, eq=False)
class SparseMap(WeightsMap):
    """`weights` on `columns`, [batch, head, query, n] each, over `keys` keys; column -1 stands for no key.

    No column stands twice in a row: `of` adds up the weights of those that do.

    >>> import torch
    >>> from headwater.kernels.mixers.sparse import SparseMap
    >>> columns = torch.tensor([[[[0, 2, 2], [1, -1, -1]]]])
    >>> map = SparseMap.of(columns, torch.tensor([[[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]]]), keys=3)
    >>> map.dense()[0, 0].tolist()
    [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    """

    columns: Int[Tensor, "batch head query n"]
    weights: Float[Tensor, "batch head query n"]
    keys: int
    aligned: bool = False

    @classmethod
    def of(
        cls, columns: Int[Tensor, "#batch #head #query n"], weights: Float[Tensor, "batch head query n"],
        keys: int, aligned: bool = False,
    ) -> Self:  # fmt: skip
        """From any list: columns outside of the keys are left out, equal columns of a row become one."""
        columns = columns.expand_as(weights)
        outside = (columns < 0) | (columns >= keys)
        sorted_columns, order = columns.masked_fill(outside, -1).sort(-1)
        sorted_weights = weights.masked_fill(outside, 0.0).gather(-1, order)
        begins = torch.nn.functional.pad(sorted_columns.diff(dim=-1) != 0, (1, 0), value=False)
        slot = begins.long().cumsum(-1)
        found = torch.full_like(sorted_columns, -1).scatter(-1, slot, sorted_columns)
        return cls(found, torch.zeros_like(weights).scatter_add(-1, slot, sorted_weights), keys, aligned)

    @classmethod
    def of_edges(
        cls, scores: Float[Tensor, "batch head edge"], queries: Int[Tensor, " edge"], keys: Int[Tensor, " edge"],
        nodes: int,
    ) -> Self:  # fmt: skip
        """A softmax of the scores over the edges of each query; `queries` and `keys` are their ends, none twice."""
        degree = queries.bincount(minlength=nodes)
        order = queries.argsort(stable=True)
        begins = degree.cumsum(0) - degree
        slot = torch.arange(len(queries), device=queries.device) - begins[queries[order]]
        n = int(degree.max()) if len(degree) else 0
        columns = torch.full((nodes, n), -1, device=queries.device)
        columns[queries[order], slot] = keys[order]
        listed = scores.new_full((*scores.shape[:2], nodes, n), -torch.inf)
        listed[:, :, queries[order], slot] = scores[:, :, order]
        weights = listed.softmax(-1).masked_fill(columns < 0, 0.0)  # NaN where a node has no edge
        return cls(columns.expand_as(weights), weights, nodes, aligned=True)

    @classmethod
    def of_samples(
        cls, points: Float[Tensor, "batch query head level point 2"],
        weights: Float[Tensor, "batch query head level point"], grids: Sequence[tuple[int, int]],
    ) -> Self:  # fmt: skip
        """Deformable attention: `points` are (x, y) from 0 to 1 in each of the `grids` (height, width).

        The keys are the cells of all grids, one grid after the other, row by row.
        """
        columns, shares, first = [], [], 0
        for level, (height, width) in enumerate(grids):
            # cell c has its middle at (c + 1/2) / size
            place = points[:, :, :, level] * points.new_tensor([width, height]) - 0.5
            low = place.floor()
            part = place - low
            for across, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
                x, y = low[..., 0].long() + across, low[..., 1].long() + down
                inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
                columns.append(torch.where(inside, first + y * width + x, -1))
                of_x, of_y = (
                    p if one else 1 - p for p, one in zip(part.unbind(-1), (across, down), strict=True)
                )
                shares.append(weights[:, :, :, level] * of_x * of_y)
            first += height * width
        listed, given = (torch.cat(parts, -1).transpose(1, 2) for parts in (columns, shares))
        return cls.of(listed, given, first)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        batch, heads, queries, _ = self.weights.shape
        return (batch, heads, queries, self.keys)

    @property
    def signed(self) -> bool:  # type: ignore[override]
        """Whether a weight is negative."""
        return bool((self.weights < 0).any())

    @property
    def live(self) -> Bool[Tensor, "batch head query"]:
        """The rows that list a key."""
        return (self.columns >= 0).any(-1)

    def gather(self, x: OverKeys) -> AtQueries:
        """`map @ x`, some queries at a time."""
        batch, heads, queries, n = self.weights.shape
        out = self.weights.new_zeros(batch, heads, queries, x.shape[-1])
        x = x.to(out).expand(-1, heads, -1, -1)
        step = max(BLOCK_ELEMENTS // max(batch * heads * n * x.shape[-1], 1), 1)
        for begin in range(0, queries, step):
            rows = slice(begin, begin + step)
            place = (
                self.columns[:, :, rows].clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
            )
            values = x.gather(2, place).unflatten(2, (-1, n))
            out[:, :, rows] = torch.einsum("bhqn,bhqnc->bhqc", self.weights[:, :, rows], values)
        return out

    def scatter(self, y: OverQueries) -> AtKeys:
        """`map.T @ y`, some queries at a time."""
        batch, heads, queries, n = self.weights.shape
        out = self.weights.new_zeros(batch, heads, self.keys, y.shape[-1])
        y = y.to(out).expand(-1, heads, -1, -1)
        step = max(BLOCK_ELEMENTS // max(batch * heads * n * y.shape[-1], 1), 1)
        for begin in range(0, queries, step):
            rows = slice(begin, begin + step)
            sent = (self.weights[:, :, rows, :, None] * y[:, :, rows, None]).flatten(2, 3)
            place = self.columns[:, :, rows].clamp_min(0).flatten(2)[..., None].expand_as(sent)
            out = out.scatter_add(2, place, sent)
        return out

    def window(self, rows: slice, columns: slice, heads: Tensor) -> Weights:
        """Weights of plain slices and chosen heads."""
        listed, weights = self.columns[:, heads][:, :, rows], self.weights[:, heads][:, :, rows]
        inside = (listed >= columns.start) & (listed < columns.stop)
        width = columns.stop - columns.start
        # one more column takes what is outside of the window
        place = torch.where(inside, listed - columns.start, width)
        found = weights.new_zeros(*weights.shape[:3], width + 1)
        return found.scatter_add(-1, place, weights)[..., :width]

    def measured(self, names: set[str], window: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """The named row statistics from the lists alone; "max" is of the listed keys."""
        listed, weights = self.columns, self.weights
        apart = torch.arange(self.shape[2], device=listed.device)[:, None] - listed
        size = apart.abs().to(weights)
        there = weights.masked_fill(listed < 0, -torch.inf)
        largest, place = there.max(-1)
        yield (
            slice(0, self.shape[2]),
            {
                "entropy": entropy(weights) if "entropy" in names else weights[..., 0],
                "max": largest,
                "argmax": listed.gather(-1, place[..., None])[..., 0],
                "self": (weights * (apart == 0)).sum(-1),
                "previous": (weights * (apart == 1)).sum(-1),
                "distance": (weights * size).sum(-1),
                "distance_squared": (weights * size.square()).sum(-1),
                "windowed_distance": (weights * size.clamp(max=window)).sum(-1),
            },
        )

    def visible(self) -> Int[Tensor, "batch head key"]:
        """How many queries list each key."""
        there = (self.columns >= 0).long()
        found = torch.zeros(*self.shape[:2], self.keys, dtype=torch.long, device=there.device)
        return found.scatter_add(-1, self.columns.clamp_min(0).flatten(2), there.flatten(2))
