"""Blocks of rows cover every row of the chosen heads once, and no block is larger than it may be.

Mutation seen to fail here: the last rows of a map that is no multiple of a block left out.
"""

from __future__ import annotations

import pytest
import torch

from headwater.kernels.tiles.mask import Mask
from headwater.kernels.tiles.row_blocks import blocks

CAUSAL = Mask(70, 90, right=0)


@pytest.mark.parametrize("elements", [1, 1500, 10_000, 2**19])
@pytest.mark.parametrize("heads", [[2, 0], [0, 1, 2, 3, 4]])
def test_every_row_comes_once_with_the_columns_it_sees(elements, heads):
    seen = torch.zeros(3, 5, 70, dtype=torch.long)
    for block in blocks(3, heads, CAUSAL, elements):
        seen[block.batch, block.heads.tolist(), block.rows] += 1
        assert block.columns.stop >= block.rows.stop, "a causal row sees its own position"
        size = len(block.heads) * len(range(*block.batch.indices(3))) * len(range(*block.rows.indices(70)))
        assert size * 90 <= max(elements, 16 * 90)
    expected = torch.zeros_like(seen)
    expected[:, heads] = 1
    assert torch.equal(seen, expected)
