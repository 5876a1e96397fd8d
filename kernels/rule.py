"""The score rule: everything between `q·k` and the softmax, evaluated tile by tile.

`s_ij = cap(scale * q_i·k_j) + bias_ij`, then the score edits in their order, then -inf where the mask hides the pair;
`p_ij = exp(s_ij - lse_i)` with the log-sum-exp taken over the visible keys and, where the head has one, its learned
sink logit. `cap(x) = softcap * tanh(x / softcap)` (Gemma 2). With a learned sink the weights of a row on real keys sum
to less than 1 (GPT-OSS).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.kernels.edits import ScoreEdit
from headwater.kernels.mask import Mask


@dataclass(frozen=True, eq=False)
class ScoreRule:
    """`bias` broadcasts to [batch, head, query, key]; `sinks` is [head]; scores have no unit, `scale` is 1/sqrt(d)."""

    scale: float
    mask: Mask
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    edits: tuple[ScoreEdit, ...] = ()

    def scores(
        self, q: Tensor, k: Tensor, rows: slice, columns: slice, batch: slice, heads: Tensor
    ) -> Tensor:
        """Masked scores of one tile, [batch, head, row, column], in float32 (float64 for float64 queries).

        `q` is [batch, head, query, d_head], `k` [batch, kv head, key, d_head]; `heads` are query heads.
        """
        high = torch.float64 if q.dtype == torch.float64 else torch.float32
        group = q.shape[1] // k.shape[1]
        every = len(heads) == q.shape[1]
        queries = (q[batch, :, rows] if every else q[batch][:, heads, rows]).to(high)
        keys = (k[batch, :, columns] if every and group == 1 else k[batch][:, heads // group, columns]).to(
            high
        )
        scores = torch.matmul(queries * self.scale, keys.transpose(-1, -2))
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores = scores + self._bias_tile(rows, columns, batch, heads).to(scores)
        for edit in self.edits:
            scores = edit.apply(scores, rows, columns, batch, heads)
        return self._masked(scores, rows, columns, batch, heads)

    def _masked(self, scores: Tensor, rows: slice, columns: slice, batch: slice, heads: Tensor) -> Tensor:
        """-inf where the mask hides; where a band alone hides, its rim is all that is looked at."""
        begin, end = self.mask.interior(rows, columns)
        whole = scores.requires_grad or end <= begin
        for part in [columns] if whole else [slice(columns.start, begin), slice(end, columns.stop)]:
            visible = self.mask.tile(rows, part, batch, heads, scores.device)
            if visible is None:
                continue
            if whole:
                return scores.masked_fill(~visible, float("-inf"))
            inside = slice(part.start - columns.start, part.stop - columns.start)
            scores[..., inside].masked_fill_(~visible, float("-inf"))
        return scores

    def _bias_tile(self, rows: slice, columns: slice, batch: slice, heads: Tensor) -> Tensor:
        assert self.bias is not None
        bias = self.bias
        bias = bias if bias.shape[0] == 1 else bias[batch]
        bias = bias if bias.shape[1] == 1 else bias[:, heads]
        bias = bias if bias.shape[2] == 1 else bias[:, :, rows]
        return bias if bias.shape[3] == 1 else bias[..., columns]

    def logsumexp(self, scores: Tensor, heads: Tensor) -> Tensor:
        """Row log-sum-exp with the sink logit merged, [batch, head, row]; -inf on a row that sees nothing."""
        lse = scores.logsumexp(-1)
        if self.sinks is None:
            return lse
        sink = self.sinks[heads].to(lse)[None, :, None].expand_as(lse)
        return torch.where(lse == float("-inf"), lse, torch.logaddexp(lse, sink))
