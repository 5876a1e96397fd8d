"""The score rule: everything between `q·k` and the weights, evaluated tile by tile.

`s_ij = cap(scale * q_i·k_j) + bias_ij - slope * |i - j|`, then the score edits in their order, then -inf where the mask
hides the pair; `p_ij = exp(s_ij - lse_i)` with the log-sum-exp taken over the visible keys and, where the head has one,
its learned sink logit. `cap(x) = softcap * tanh(x / softcap)` (Gemma 2). With a learned sink the weights of a row on
real keys sum to less than 1 (GPT-OSS). Other ways from scores to weights are in `normaliser.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwater.kernels.edits import BiasKeys, ScoreEdit
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask


@dataclass(frozen=True, eq=False)
class ScoreRule:
    """`bias` broadcasts to [batch, head, query, key]; `sinks` is [head], or [batch, head, query] where the sink's logit
    depends on the query (a learned key); scores have no unit, `scale` is 1/sqrt(d).

    `alibi` holds the slopes [head] of ALiBi (Press et al. 2022): -slope * |query - key| is added, in absolute
    positions. Where all keys lie behind that is slope * (key - query), which models write up to a constant of the row
    that no softmax sees. `normaliser` None is the softmax.
    """

    scale: float
    mask: Mask
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    edits: tuple[ScoreEdit, ...] = ()
    normaliser: Normaliser | None = None
    alibi: Tensor | None = None

    def detached(self) -> ScoreRule:
        """The rule without the gradients of its learned sinks, its bias and its slopes."""
        sinks, bias, alibi = (None if x is None else x.detach() for x in (self.sinks, self.bias, self.alibi))
        edits = tuple(replace(e, bias=e.bias.detach()) if isinstance(e, BiasKeys) else e for e in self.edits)
        return replace(self, sinks=sinks, bias=bias, alibi=alibi, edits=edits)

    @property
    def signed(self) -> bool:
        """Whether weights may be negative."""
        kind = self.normaliser
        if kind is None or kind.name not in ("cog", "products", "linear"):
            return False
        moved = self.bias is not None or self.alibi is not None or bool(self.edits)
        return kind.name == "cog" or kind.features == "identity" or moved

    def scores(
        self, q: Tensor, k: Tensor, rows: slice, columns: slice, batch: slice, heads: Tensor
    ) -> Tensor:
        """Masked scores of one tile, [batch, head, row, column], in float32 (float64 for float64 queries).

        `q` is [batch, head, query, d_head], `k` [batch, kv head, key, d_head]; `heads` are query heads.
        """
        high = torch.float64 if q.dtype == torch.float64 else torch.float32
        group = q.shape[1] // k.shape[1]
        every = len(heads) == q.shape[1] and bool((heads == torch.arange(len(heads))).all())
        queries = (q[batch, :, rows] if every else q[batch][:, heads, rows]).to(high)
        keys = (k[batch, :, columns] if every and group == 1 else k[batch][:, heads // group, columns]).to(
            high
        )
        scores = torch.matmul(queries * self.scale, keys.transpose(-1, -2))
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores = scores + self._bias_tile(rows, columns, batch, heads).to(scores)
        block = Block(batch, heads, rows, columns)
        if self.alibi is not None:
            row, column = block.positions(q.device)
            slopes = self.alibi[heads].to(scores)[None, :, None, None]
            scores = scores - slopes * (row + self.mask.shift - column).abs()
        for edit in self.edits:
            scores = edit.apply(scores, block, self.mask)
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

    @property
    def sink_logits(self) -> Tensor | None:
        """Logits of the learned sink, [batch|1, head, query|1]; None where there is none."""
        return self.sinks[None, :, None] if self.sinks is not None and self.sinks.dim() == 1 else self.sinks

    def row_constant(self, scores: Tensor, block: Block) -> Tensor:
        """L of whole rows, [batch, head, row], the sink merged: the log-sum-exp; -inf on a row that sees nothing."""
        sink = self.sink_logits
        if sink is not None:
            sink = sink[:, block.heads] if len(sink) == 1 else sink[block.batch][:, block.heads]
            sink = (sink if sink.shape[2] == 1 else sink[:, :, block.rows]).to(scores)
        if self.normaliser is not None:
            return self.normaliser.row_constant(scores, sink)
        if scores.requires_grad:
            # the slope of the log-sum-exp of nothing is NaN
            nothing = (scores == float("-inf")).all(-1)
            lse = (
                scores.masked_fill(nothing[..., None], 0.0).logsumexp(-1).masked_fill(nothing, float("-inf"))
            )
        else:
            lse = scores.logsumexp(-1)
        if sink is None:
            return lse
        return torch.where(lse == float("-inf"), lse, torch.logaddexp(lse, sink.expand_as(lse)))
