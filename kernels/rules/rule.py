"""The score rule: everything between `q·k` and the weights, evaluated tile by tile.

`s_ij = cap(scale * q_i·k_j) + bias_ij - slope * |i - j|`, then the score edits in their order, then -inf where the mask
hides the pair; `p_ij = exp(s_ij - lse_i)` with the log-sum-exp taken over the visible keys and, where the head has one,
its learned sink logit. `cap(x) = softcap * tanh(x / softcap)` (Gemma 2). With a learned sink the weights of a row on
real keys sum to less than 1 (GPT-OSS). Other ways from scores to weights are in `normaliser.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.kernels.edits.mixing import Mixing
from headwater.kernels.edits.scores import ScoreEdit
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.tiles.block import Block, tile_dtype
from headwater.kernels.tiles.mask import HIDDEN, Mask
from headwater.kernels.tiles.shapes import Keys, Queries, Tile


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
    sinks: Float[Tensor, " head"] | Float[Tensor, "#batch head #query"] | None = None
    bias: Float[Tensor, "#batch #head #query #key"] | None = None
    edits: tuple[ScoreEdit, ...] = ()
    normaliser: Normaliser | None = None
    alibi: Float[Tensor, " head"] | None = None

    def detached(self) -> ScoreRule:
        """The rule without the gradients of its learned sinks, its bias, its slopes and its edits."""
        if self.sinks is None and self.bias is None and self.alibi is None and not self.edits:
            return self
        sinks, bias, alibi = (None if x is None else x.detach() for x in (self.sinks, self.bias, self.alibi))
        edits = tuple(detached(edit) for edit in self.edits)
        return replace(self, sinks=sinks, bias=bias, alibi=alibi, edits=edits)

    @property
    def signed(self) -> bool:
        """Whether weights may be negative."""
        kind = self.normaliser
        if kind is None or kind.name not in ("cog", "products", "linear"):
            return False
        moved = self.bias is not None or self.alibi is not None or bool(self.edits)
        return kind.name == "cog" or kind.features == "identity" or moved

    def scores(self, q: Queries, k: Keys, block: Block) -> Tile:
        """Masked scores of one block, in float32 (float64 for float64 queries)."""
        return self._masked(self._edited(q, k, block, self.edits), block)

    @property
    def mixes(self) -> bool:
        """Whether the score of a pair takes those of other heads or other pairs."""
        return any(isinstance(edit, Mixing) for edit in self.edits)

    def _edited(self, q: Queries, k: Keys, block: Block, edits: tuple[ScoreEdit, ...]) -> Tensor:
        """Scores of a block after the first edits."""
        last = max((n for n, edit in enumerate(edits) if isinstance(edit, Mixing)), default=-1)
        mixing = edits[last] if last >= 0 else None
        if isinstance(mixing, Mixing):
            scores = mixing.mixed(
                lambda there: self._edited(q, k, there, edits[:last]), block, self.mask, q.shape[1]
            )
        else:
            scores = self._plain(q, k, block)
        for edit in edits[last + 1 :]:
            assert not isinstance(edit, Mixing)
            scores = edit.apply(scores, block, self.mask)
        return scores

    def _plain(self, q: Queries, k: Keys, block: Block) -> Tensor:
        """Scores of a block before the edits."""
        scores = _products(q, k, self.scale, block)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores = scores + block.of_pairs(self.bias).to(scores)
        if self.alibi is not None:
            row, column = block.positions(q.device)
            slopes = block.of_heads(self.alibi).to(scores)
            scores = scores - slopes * (row + self.mask.shift - column).abs()
        return scores

    def _masked(self, scores: Tensor, block: Block) -> Tensor:
        """-inf where the mask hides; where a band alone hides, its rim is all that is looked at."""
        columns = block.columns
        begin, end = self.mask.interior(block.rows, columns)
        if scores.requires_grad or block.chosen is not None or end <= begin:
            visible = self.mask.tile(block, scores.device)
            return scores if visible is None else scores.masked_fill(~visible, HIDDEN)
        for part in slice(columns.start, begin), slice(end, columns.stop):
            visible = self.mask.tile(block._replace(columns=part), scores.device)
            if visible is not None:
                inside = slice(part.start - columns.start, part.stop - columns.start)
                scores[..., inside].masked_fill_(~visible, HIDDEN)
        return scores

    @property
    def sink_logits(self) -> Tensor | None:
        """Logits of the learned sink, [batch|1, head, query|1]; None where there is none."""
        return self.sinks[None, :, None] if self.sinks is not None and self.sinks.dim() == 1 else self.sinks

    def row_constant(self, scores: Tile, block: Block) -> Float[Tensor, "block_batch block_head row"]:
        """L of whole rows, the sink merged: the log-sum-exp; -inf on a row that sees nothing."""
        sink = self.sink_logits
        if sink is not None:
            sink = block.of_maps(sink if sink.shape[2] == 1 else sink[:, :, block.rows]).to(scores)
        if self.normaliser is not None:
            return self.normaliser.row_constant(scores, sink)
        if scores.requires_grad:
            # the slope of the log-sum-exp of nothing is NaN
            nothing = (scores == HIDDEN).all(-1)
            lse = scores.masked_fill(nothing[..., None], 0.0).logsumexp(-1).masked_fill(nothing, HIDDEN)
        else:
            lse = scores.logsumexp(-1)
        return with_sink(lse, sink)


def detached(edit: Any) -> Any:
    """An edit without the gradients of its tensors."""
    learned = {
        name: x.detach() for name, x in vars(edit).items() if isinstance(x, Tensor) and x.requires_grad
    }
    return replace(edit, **learned) if learned else edit


def with_sink(lse: Tensor, sink: Tensor | None) -> Tensor:
    """The log-sum-exp with the logit of a learned sink, which broadcasts to it; a row that sees nothing has none."""
    if sink is None:
        return lse
    return torch.where(lse == HIDDEN, lse, torch.logaddexp(lse, sink.to(lse).expand_as(lse)))


def _products(q: Queries, k: Keys, scale: float, block: Block) -> Tile:
    """scale * q·k of the pairs of a block."""
    batch, heads, rows, columns, chosen = block
    high, group = tile_dtype(q), q.shape[1] // k.shape[1]
    every = len(heads) == q.shape[1] and bool((heads == torch.arange(len(heads))).all())
    queries = (q[batch, :, rows] if every else q[batch][:, heads, rows]).to(high) * scale
    if chosen is None:
        keys = k[batch, :, columns] if every and group == 1 else k[batch][:, heads // group, columns]
        return torch.matmul(queries, keys.to(high).transpose(-1, -2))
    if chosen.shape[:3] == (1, 1, 1):
        keys = k[batch][:, heads // group][:, :, chosen.flatten()]
        return torch.matmul(queries, keys.to(high).transpose(-1, -2))
    if every and chosen.shape[:2] == (1, 1):
        keys = k[batch][:, :, chosen[0, 0]].to(high)
        by_key_head = queries.unflatten(1, (k.shape[1], group))
        return torch.einsum("bhgrd,bhrnd->bhgrn", by_key_head, keys).flatten(1, 2)
    samples = torch.arange(batch.start, batch.stop, device=k.device)[:, None, None, None]
    keys = k[samples, (heads // group).to(k.device)[:, None, None], chosen].to(high)
    return torch.einsum("bhrd,bhrnd->bhrn", queries, keys)
