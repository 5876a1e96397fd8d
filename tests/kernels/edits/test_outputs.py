"""Edits of outputs against the same written out with torch.where."""

from __future__ import annotations

import torch
from small_edits import EVERY, HEADS, PER_ROW, N, run

from headwater.kernels.edits.outputs import OffsetOutput, ReplaceOutput


def test_outputs_are_replaced_or_moved_on_the_heads_of_each_row():
    z, _ = run()
    positions = torch.arange(N)[None]
    values = torch.randn(2, HEADS, N, 4).double()
    chosen = PER_ROW[:, :, None, None]
    assert torch.equal(OffsetOutput(PER_ROW, values).apply(z, positions), torch.where(chosen, z + values, z))
    assert torch.equal(ReplaceOutput(PER_ROW, values).apply(z, positions), torch.where(chosen, values, z))
    one = OffsetOutput(EVERY, values[:1, :, :1]).apply(z, positions)
    assert torch.equal(one, z + values[:1, :, :1])
    late = OffsetOutput(EVERY, values).apply(z[:, :, :2], torch.tensor([[3, 5]]))
    assert torch.equal(late, z[:, :, :2] + values[:, :, [3, 5]])
