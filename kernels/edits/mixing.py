"""Mixing: edits whose number at a pair takes those of other heads at the pair, or of neighbouring pairs of the head.

`MixHeads` on scores and on weights is talking-heads attention (Shazeer et al. 2020); with matrices that depend on the
query and the key it is dynamically composed attention (Xiao et al. 2024). `ConvolveScores` is the key–query
convolution of multi-token attention (Golovneva et al. 2025). A tile of one head then costs the tiles of all heads,
and a chosen pair those of its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.kernels.edits.patterns import moved
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import HIDDEN, Mask

Read = Callable[[Block], Tensor]  # the numbers before the edit: [batch, head, row, column] of any block


@dataclass(frozen=True, eq=False)
class MixHeads:
    """x_g -> sum over h of M_gh x_h, for scores before the mask or for weights; M = mix + of_query_i + of_key_j.

    `mix` is [batch|1, head, head], `of_query` [batch|1, query, head, head], `of_key` [batch|1, key, head, head], each
    indexed by the new head, then the old. A score that is hidden in a head counts as 0 in the others and stays hidden;
    a row without weights stays without.
    """

    mix: Tensor
    of_query: Tensor | None = None
    of_key: Tensor | None = None

    @property
    def signed(self) -> bool:
        """Whether a mixture of positive numbers may be negative."""
        parts = (self.mix, self.of_query, self.of_key)
        return any(bool((part < 0).any()) for part in parts if part is not None)

    def mixed(self, read: Read, block: Block, mask: Mask, heads: int) -> Tensor:
        """The mixture on a block, from a reader of all `heads`."""
        if block.chosen is not None and block.chosen.shape[1] > 1:
            # each head has its own columns, at which all heads are read
            single = [
                block._replace(heads=block.heads[n : n + 1], chosen=block.chosen[:, n : n + 1])
                for n in range(len(block.heads))
            ]
            return torch.cat([self.mixed(read, one, mask, heads) for one in single], 1)
        every = block._replace(heads=torch.arange(heads))
        return self.apply(read(every), (), every, mask)[:, block.heads]

    def resolve(self, weights: Tensor, block: Block, mask: Mask, live: Tensor) -> tuple[Tensor, ...]:
        """1 on the rows that have weights, [batch, head, row]; `weights` are those of all heads."""
        return (live.to(weights),)

    def apply(self, x: Tensor, factors: tuple[Tensor, ...], block: Block, mask: Mask) -> Tensor:
        """The mixture of a tile that has all heads."""
        hidden = x == HIDDEN
        x = x.masked_fill(hidden, 0.0)
        found = torch.einsum("bgh,bhrc->bgrc", block.of_batch(self.mix).to(x).expand(len(x), -1, -1), x)
        if self.of_query is not None:
            rows = block.of_batch(self.of_query)[:, block.rows].to(x).expand(len(x), -1, -1, -1)
            found = found + torch.einsum("brgh,bhrc->bgrc", rows, x)
        if self.of_key is not None:
            given = block.of_batch(self.of_key).to(x)
            if block.chosen is None:
                columns = given[:, block.columns].expand(len(x), -1, -1, -1)
                found = found + torch.einsum("bcgh,bhrc->bgrc", columns, x)
            else:
                place = block.chosen[:, 0].to(x.device).expand(len(x), *x.shape[2:])
                batch = torch.arange(len(x), device=x.device)[:, None, None] % len(given)
                found = found + torch.einsum("brcgh,bhrc->bgrc", given[batch, place], x)
        if factors:
            found = torch.where(factors[0][..., None] > 0, found, x)
        return found.masked_fill(hidden, HIDDEN)


@dataclass(frozen=True, eq=False)
class ConvolveScores:
    """s_ij -> sum over a, b of kernel[h, a, b] s_(i-a)(j+ahead-b), where pairs that the mask hides count as 0.

    `kernel` is [batch|1, head, back, wide]: `back` queries up to the own, `wide` keys of which `ahead` stand after the
    own. It needs all queries, so ValueError where they begin in the middle of a text and `back` is above 1.
    """

    kernel: Tensor
    ahead: int

    def mixed(self, read: Read, block: Block, mask: Mask, heads: int) -> Tensor:
        """The convolution on a block, from a reader of other pairs of its heads."""
        back, wide = self.kernel.shape[2:]
        if mask.query_offset and back > 1:
            raise ValueError("a convolution over queries needs the queries that a cache has not kept")
        kernel = block.of_maps(self.kernel)

        def shown(there: Block) -> Tensor:
            scores = read(there)
            seen = mask.tile(there, scores.device)
            hidden = scores == HIDDEN if seen is None else (scores == HIDDEN) | ~seen
            if mask.valid_queries is not None:
                hidden = hidden | ~there.of_queries(mask.valid_queries).to(scores.device)
            return scores.masked_fill(hidden, 0.0)

        if block.chosen is None:
            rows, columns = block.rows, block.columns
            # a larger tile, rows first by `back - 1` and columns by the keys on both sides
            larger = block._replace(
                rows=slice(rows.start - back + 1, rows.stop),
                columns=slice(columns.start + self.ahead - wide + 1, columns.stop + self.ahead),
            )
            tile = moved(shown, larger, (0, 0), (mask.queries, mask.keys))
            taps = kernel.flip(-2, -1).to(tile).expand(len(tile), -1, -1, -1).flatten(0, 1)
            found = torch.nn.functional.conv2d(tile.flatten(0, 1)[None], taps[:, None], groups=len(taps))
            found = found[0].unflatten(0, tile.shape[:2])
        else:
            found = torch.zeros(())
            for a in range(back):
                for b in range(wide):
                    tile = moved(shown, block, (-a, self.ahead - b), (mask.queries, mask.keys))
                    found = found + kernel[:, :, a, b, None, None].to(tile) * tile
        return found.masked_fill(read(block) == HIDDEN, HIDDEN)


Mixing = MixHeads | ConvolveScores
