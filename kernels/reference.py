"""The meaning of attention, its edits and its statistics: dense float64 maps, written to be read beside the formulas.

Every other backend must agree with this page. It builds the queries × keys map of every head, so it is for small
inputs: tests, and `AttentionMap.dense()` is checked against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headwater.kernels.edits import NOTHING, BlockScores, MixIdentity, Rescale, ScaleScores, WeightEdit
from headwater.kernels.rule import ScoreRule


class Dense(NamedTuple):
    """Output [batch, head, query, d_value], lse [batch, head, query] and weights [batch, head, query, key]."""

    z: Tensor
    lse: Tensor
    weights: Tensor


def visible(rule: ScoreRule, batch: int, heads: int) -> Tensor:
    """Which keys each query sees, bool [batch, head, query, key]."""
    mask = rule.mask
    query = torch.arange(mask.queries)[:, None] + mask.query_offset
    key = torch.arange(mask.keys)[None, :] + mask.key_offset
    seen = torch.ones(batch, heads, mask.queries, mask.keys, dtype=torch.bool)
    if mask.right is not None:
        seen &= key - query <= mask.right
    if mask.left is not None:
        seen &= query - key <= mask.left
    if mask.valid_keys is not None:
        seen &= mask.valid_keys[:, None, None, :]
    if mask.extra is not None:
        index = torch.arange(batch)[:, None, None, None], torch.arange(heads)[None, :, None, None]
        seen &= mask.extra(*index, query[None, None], key[None, None])
    return seen


def attend(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, edits: Sequence[WeightEdit] = ()) -> Dense:
    """Attention with its score edits and weight edits, every step on the whole map."""
    batch, heads = q.shape[:2]
    group = heads // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)

    scores = rule.scale * q @ k.mT
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if rule.bias is not None:
        scores = scores + rule.bias.double()
    for edit in rule.edits:
        head = edit.heads[None, :, None, None]
        if isinstance(edit, ScaleScores):
            scores = torch.where(head, edit.tau * scores, scores)
        if isinstance(edit, BlockScores):
            pairs = edit.queries[:, None, :, None] & edit.keys[:, None, None, :]
            scores = torch.where(head & pairs, -torch.inf, scores)
    scores = torch.where(visible(rule, batch, heads), scores, -torch.inf)

    columns = [scores]
    if rule.sinks is not None:
        columns.append(rule.sinks.double()[None, :, None, None].expand(batch, heads, q.shape[2], 1))
    sees_any = (scores > -torch.inf).any(-1)
    lse = torch.where(sees_any, torch.cat(columns, -1).logsumexp(-1), -torch.inf)
    weights = torch.where(sees_any[..., None], torch.exp(scores - lse[..., None]), 0.0)

    for edit in edits:
        weights = torch.where(edit.heads[None, :, None, None], edited(weights, edit, rule), weights)
    return Dense(weights @ v, lse, weights)


def edited(weights: Tensor, edit: WeightEdit, rule: ScoreRule) -> Tensor:
    """One weight edit on every head."""
    if isinstance(edit, Rescale):
        keys, to = edit.keys[:, None, None, :], edit.to[:, None, None, :]
        freed = (1 - edit.keep) * (weights * keys).sum(-1, keepdim=True)
        target = (weights * to).sum(-1, keepdim=True)
        moved = (
            torch.where(keys, edit.keep * weights, weights) + torch.where(to, weights, 0.0) * freed / target
        )
        return torch.where(target > NOTHING, moved, weights)
    assert isinstance(edit, MixIdentity)
    mask = rule.mask
    query = torch.arange(mask.queries)[:, None] + mask.query_offset
    key = torch.arange(mask.keys)[None, :] + mask.key_offset
    identity = (query == key).double()[None, None]
    if mask.valid_keys is not None:
        identity = identity * mask.valid_keys[:, None, None, :]
    return torch.where(
        identity.sum(-1, keepdim=True) > 0, (1 - edit.amount) * weights + edit.amount * identity, weights
    )


def statistics(dense: Dense, rule: ScoreRule, groups: Tensor | None = None) -> dict[str, Tensor]:
    """Every statistic by its definition; `groups` is bool [group, key]. Rows: NaN where padding or nothing is seen.

    `argmax` is -1 on such rows.
    """
    batch, heads, queries, keys = dense.weights.shape
    mask, weights = rule.mask, dense.weights
    real = dense.lse > -torch.inf
    if mask.valid_queries is not None:
        real = real & mask.valid_queries[:, None]
    weights = torch.where(real[..., None], weights, 0.0)
    query = torch.arange(queries)[:, None] + mask.query_offset
    key = torch.arange(keys)[None, :] + mask.key_offset
    seen = visible(rule, batch, heads)
    first = torch.zeros_like(weights).scatter(-1, seen.int().argmax(-1, keepdim=True), 1.0)

    def row(values: Tensor) -> Tensor:
        return torch.where(real, values, torch.nan)

    found = {
        "lse": row(dense.lse),
        "entropy": row(-torch.xlogy(weights, weights).sum(-1)),
        "max": row(weights.amax(-1)),
        "argmax": torch.where(real, weights.argmax(-1), -1),
        "self": row((weights * (query == key)).sum(-1)),
        "previous": row((weights * (query - 1 == key)).sum(-1)),
        "first": row((weights * first).sum(-1)),
        "distance": row((weights * (query - key).abs()).sum(-1)),
        "row_mass": row(weights.sum(-1)),
        "received": weights.sum(-2),
        "visible": (
            seen & (mask.valid_queries[:, None, :, None] if mask.valid_queries is not None else True)
        ).sum(-2),
    }
    found["sink"] = found["received"] / torch.where(
        found["visible"] > 0, found["visible"].double(), torch.nan
    )
    if groups is not None:
        mass = torch.einsum("bhqk,gk->bhgq", weights, groups.double())
        found["mass"] = torch.where(real[:, :, None], mass, torch.nan)
    return found
