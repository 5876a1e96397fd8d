"""Weight edits joined from parts: fused attention over whole classes of keys, and a few keys one by one.

Nothing is subtracted, so the output is as exact where the few keys hold nearly all mass as where they hold none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headwater.kernels.backends.backend import Pass
from headwater.kernels.backends.key_classes import KeyClasses, fold, own_columns
from headwater.kernels.edits.weights import MixIdentity, WeightEdit
from headwater.kernels.rules.rule import ScoreRule, with_sink
from headwater.kernels.tiles import row_blocks
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.heads import per_query_head


class Part(NamedTuple):
    """Attention over keys of class `kind` alone, without sinks: z [batch, head, query, d] and lse."""

    kind: int
    z: Tensor
    lse: Tensor


def joined(
    q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, edits: Sequence[WeightEdit],
    classes: KeyClasses, parts: Sequence[Part], columns: Tensor,
) -> Pass:  # fmt: skip
    """Attention over all keys: those of the parts and `columns`, int64 [n], which no part has. In high precision."""
    batch, heads, queries, _ = q.shape
    # lse = ln(sum_c exp(lse_c) + sum_n exp(s_n)): the parts c and the single columns n share one denominator, into
    # which a learned sink goes last. A part's weights are then exp(lse_c - lse) times those it has by itself.
    scores = _scores(q, k, rule, columns)
    lse = torch.stack([*(part.lse for part in parts), scores.logsumexp(-1)]).logsumexp(0)
    live = lse > -torch.inf
    lse = with_sink(lse, rule.sink_logits)
    row = torch.where(live, lse, torch.inf)
    weights, shares = torch.exp(scores - row[..., None]), [torch.exp(part.lse - row) for part in parts]
    groups = classes.groups()[:, :, columns].to(weights).expand(batch, -1, -1)
    masses = torch.einsum("bhqk,bck->bhcq", weights, groups)
    for part, share in zip(parts, shares, strict=True):
        masses[:, :, part.kind] += share
    # every part has keys of one class, so its edited output is factor * share * z_c
    folded, steps = fold(edits, classes, rule, live, masses)
    place = classes.of_key[:, columns].long()[:, None, :, None].expand(batch, heads, -1, queries)
    z = (weights * folded.factor.gather(2, place).mT) @ per_query_head(v[:, :, columns].to(weights), heads)
    if folded.mixed:
        z += folded.gather(rule, v.to(weights))
    for part, share in zip(parts, shares, strict=True):
        z.addcmul_(part.z, (folded.factor[:, :, part.kind] * share)[..., None])
    if any(isinstance(edit, MixIdentity) for edit in edits):
        own = per_query_head(v[:, :, own_columns(rule.mask, v.device)].to(z), heads)
        z.addcmul_(own, folded.kept[..., None])
    return Pass(z, lse, steps, {})


def raised(
    q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, bias: Tensor, columns: Tensor, z: Tensor, lse: Tensor
) -> Pass:
    """Attention with a bias of a few keys, [batch|1, head, n], from z and lse without it; `rule` has no edits.

    No bias makes a weight less than half of what it is, so at most one binary digit is lost.
    """
    # with p the weights without the bias:  z' = (z + sum_n p_n (e^b_n - 1) v_n) / m,  m = 1 + sum_n p_n (e^b_n - 1),
    # and lse' = lse + ln m. A learned sink is in lse, and stays where it is.
    row = torch.where(lse > -torch.inf, lse, torch.inf)
    more = torch.exp(_scores(q, k, rule, columns) - row[..., None]) * torch.expm1(bias)[:, :, None]
    whole = 1 + more.sum(-1)
    few = (more / whole[..., None]) @ per_query_head(v[:, :, columns].to(more), q.shape[1])
    return Pass(few.addcmul_(z, (1 / whole)[..., None]), lse + whole.log(), (), {})


def _scores(q: Tensor, k: Tensor, rule: ScoreRule, columns: Tensor) -> Tensor:
    """Scores of some columns, -inf where hidden: [batch, head, query, column], some rows at a time."""
    batch, heads, queries, _ = q.shape
    step = max(row_blocks.BLOCK_ELEMENTS // (heads * max(len(columns), 1)), 1)
    found = []
    for begin in range(0, queries, step):
        rows = slice(begin, min(begin + step, queries))
        block = Block(
            slice(0, batch), torch.arange(heads), rows, slice(0, k.shape[2]), columns[None, None, None]
        )
        found.append(rule.scores(q, k, block))
    return torch.cat(found, 2)
