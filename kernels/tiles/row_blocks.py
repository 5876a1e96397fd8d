"""All rows of a map in blocks of a size that stays in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask

BLOCK_ELEMENTS = 2**19  # 2 MB of float32


def blocks(
    batch: int, heads: Sequence[int] | Tensor, mask: Mask, elements: int | None = None, together: bool = False
) -> Iterator[Block]:
    """Cover all rows of the chosen heads, over the columns that the band shows them.

    Where rows are long a block has few rows and one head, or with `together` fewer rows and all heads.
    """
    heads = torch.as_tensor(heads)
    queries, keys = mask.queries, max(mask.keys, 1)
    budget = BLOCK_ELEMENTS if elements is None else elements
    if together:
        budget, least = max(budget // max(len(heads), 1), 1), 1
    else:
        least = 16
    rows = min(queries, max(budget // keys, least)) or 1
    per_head = max(budget // (rows * keys), 1)
    if together:
        per_head *= max(len(heads), 1)
    for b in range(0, batch, step := max(per_head // max(len(heads), 1), 1)):
        for chunk in heads.split(min(per_head, max(len(heads), 1))):
            for i in range(0, queries, rows):
                span = slice(i, min(i + rows, queries))
                columns = slice(*mask.key_span(span.start, span.stop))
                yield Block(slice(b, min(b + step, batch)), chunk, span, columns)
