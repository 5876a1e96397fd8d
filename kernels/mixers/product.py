"""`ProductMap`: the product of two attention maps, as agent attention has it (Han et al. 2023, arXiv 2312.08874).

Agents A, fewer than tokens, collect from the keys and hand on to the queries: O = softmax(Q Aᵀ) softmax(A Kᵀ) V. The
map of the layer is the product of the two, and its rows sum to 1 where those of both do. Products cost those of the
factors, O(S·n·d) for n agents; a window costs the agents' rows and columns of it. The rest of the published layer,
biases of the two scores and a convolution of V that is added, belongs to the factors' rules and to the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.mixers.weights_map import WeightsMap
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.row_blocks import blocks
from headwater.kernels.tiles.shapes import AtKeys, AtQueries, OverKeys, OverQueries, Weights


@dataclass(frozen=True, eq=False)
class ProductMap(WeightsMap):
    """`queries` [query, agent] times `keys` [agent, key]; ValueError where the two do not fit.

    >>> import torch
    >>> from headwater.kernels.attend import attend
    >>> from headwater.kernels.mixers.product import ProductMap
    >>> from headwater.kernels.rules.rule import ScoreRule
    >>> from headwater.kernels.tiles.mask import Mask
    >>> q, k, agents = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 3, 4)
    >>> _, handed = attend(q, agents, agents, ScoreRule(0.5, Mask(9, 3)))
    >>> _, collected = attend(agents, k, k, ScoreRule(0.5, Mask(3, 9)))
    >>> map = ProductMap(handed, collected)
    >>> map.shape, bool((map.row_mass - 1).abs().max() < 1e-5)
    ((1, 2, 9, 9), True)
    """

    queries: AttentionMap
    keys: AttentionMap
    aligned: bool = True

    def __post_init__(self) -> None:
        left, right = self.queries.shape, self.keys.shape
        if left[:2] != right[:2] or left[3] != right[2]:
            raise ValueError(
                f"the keys of the first map are the queries of the second, with the same batch and heads; got {left} "
                f"and {right}"
            )
        if self.aligned and left[2] != right[3]:
            object.__setattr__(self, "aligned", False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, head, query, key)."""
        return (*self.queries.shape[:3], self.keys.shape[3])

    @property
    def signed(self) -> bool:  # type: ignore[override]
        """Whether weights may be negative."""
        return self.queries.signed or self.keys.signed

    @property
    def live(self) -> Bool[Tensor, "batch head query"]:
        """The rows of the first map that have weights."""
        return ~torch.isinf(self.queries.lse)

    def gather(self, x: OverKeys) -> AtQueries:
        """`map @ x`, by the agents."""
        return self.queries @ (self.keys @ x)

    def scatter(self, y: OverQueries) -> AtKeys:
        """`map.T @ y`, by the agents."""
        return self.keys.T @ (self.queries.T @ y)

    def window(self, rows: slice, columns: slice, heads: Tensor) -> Weights:
        """Weights of plain slices and chosen heads."""
        batch, _, _, agents = self.queries.shape
        every = slice(0, agents)
        handed = self.queries.block(Block(slice(0, batch), heads, rows, every))
        return handed @ self.keys.block(Block(slice(0, batch), heads, every, columns)).to(handed)

    def visible(self) -> Int[Tensor, "batch head key"]:
        """How many rows with weights see each key by some agent; score edits hide nothing here."""
        batch, heads, _, keys = self.shape
        agents = self.queries.shape[3]
        found = torch.zeros(batch, heads, keys, dtype=torch.long)
        cpu, live, every = torch.device("cpu"), self.live.cpu(), torch.arange(heads)
        collected = self.keys.mask.tile(Block(slice(0, batch), every, slice(0, agents), slice(0, keys)), cpu)
        told = torch.ones(1, 1, agents, keys) if collected is None else collected.float()
        told = told.expand(batch, heads, agents, keys) * (~torch.isinf(self.keys.lse)).cpu()[..., None]
        for block in blocks(batch, range(heads), self.queries.mask):
            seen = self.queries.mask.tile(block._replace(columns=slice(0, agents)), cpu)
            rows = torch.ones(1, 1, *block.size) if seen is None else seen.float()
            pairs = rows @ told[block.batch][:, block.heads] > 0
            found[block.batch, block.heads] += (pairs & block.of_rows(live)[..., None]).sum(-2)
        return found
