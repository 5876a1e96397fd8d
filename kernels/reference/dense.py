"""Attention, its edits and its statistics as dense float64 formulas; every backend is tested against them.

It builds the queries × keys map of every head, so it is for small
inputs: tests, and `AttentionMap.dense()` is checked against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from headwater.kernels.edits.mixing import ConvolveScores, MixHeads
from headwater.kernels.edits.patterns import Fixed, Matching, Offset, OfMap, OnKeys, Pattern, Uniform
from headwater.kernels.edits.scores import (
    BiasKeys,
    BlockScores,
    EmphasiseScores,
    MaskScores,
    PlainScoreEdit,
    ScaleScores,
)
from headwater.kernels.edits.weights import (
    NOTHING,
    WITHIN_EPSILON,
    MixIdentity,
    MixPattern,
    PlainWeightEdit,
    Rescale,
    ScaleKeys,
    Shares,
    WeightEdit,
)
from headwater.kernels.reference.mixing import convolved, heads_mixed
from headwater.kernels.reference.normalisers import products, sinkhorn, weights as normalised
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.shapes import Keys, Output, PerKey, PerQuery, Queries, Values, Weights

Seen = Bool[Tensor, "batch head query key"]


class Dense(NamedTuple):
    """Output, log-sum-exp and weights, all float64."""

    z: Output
    lse: PerQuery
    weights: Weights


def visible(rule: ScoreRule, batch: int, heads: int) -> Seen:
    """Which keys each query sees."""
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
    if mask.documents is not None:
        of_query, of_key = mask.documents[:, query[:, 0]], mask.documents[:, key[0]]
        seen &= (of_query[:, :, None] == of_key[:, None, :])[:, None]
    if mask.extra is not None:
        index = torch.arange(batch)[:, None, None, None], torch.arange(heads)[None, :, None, None]
        seen &= mask.extra(*index, query[None, None], key[None, None])
    return seen


def attend(q: Queries, k: Keys, v: Values, rule: ScoreRule, edits: Sequence[WeightEdit] = ()) -> Dense:
    """Attention with its score edits and weight edits, every step on the whole map."""
    batch, heads = q.shape[:2]
    group = heads // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)

    seen = visible(rule, batch, heads)
    kind = Normaliser("softmax") if rule.normaliser is None else rule.normaliser
    scores = products(q, k, kind.name, kind.features, rule.scale, seen)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if rule.bias is not None:
        scores = scores + rule.bias.double()
    if rule.alibi is not None:
        query, key = positions(rule)
        scores = scores - rule.alibi.double()[:, None, None] * (query - key).abs()
    for edit in rule.edits:
        if isinstance(edit, MixHeads):
            changed = heads_mixed(scores, edit)
        elif isinstance(edit, ConvolveScores):
            changed = convolved(scores, edit, rule, seen)
        else:
            changed = torch.where(of_heads(edit), edited_scores(scores, edit, rule), scores)
        scores = torch.where(scores > -torch.inf, changed, -torch.inf)
    scores = torch.where(seen, scores, -torch.inf)

    if kind.name == "sinkhorn":
        mask = rule.mask
        queries = torch.ones(1, mask.queries) > 0 if mask.valid_queries is None else mask.valid_queries
        keys = torch.ones(1, mask.keys) > 0 if mask.valid_keys is None else mask.valid_keys
        weights, lse = sinkhorn(scores, kind.iterations or 1, queries, keys)
    else:
        sink = None if rule.sinks is None else rule.sinks
        sink = sink if sink is None else (sink[None, :, None] if sink.dim() == 1 else sink)[..., None]
        parameters = {"bias": kind.bias, "features": kind.features, "normalise": kind.normalise}
        weights, lse = normalised(scores, sink, kind.name, **parameters)

    sees_any = lse > -torch.inf
    for edit in edits:
        if isinstance(edit, MixHeads):
            weights = torch.where(sees_any[..., None], heads_mixed(weights, edit), weights)
            continue
        acts = of_heads(edit) & sees_any[..., None]
        if edit.rows is not None:
            acts = acts & edit.rows[..., None]
        weights = torch.where(acts, edited(weights, edit, rule), weights)
    return Dense(weights @ v, lse, weights)


def of_heads(edit: PlainScoreEdit | PlainWeightEdit) -> Bool[Tensor, "#batch head 1 1"]:
    """The heads of an edit."""
    return (edit.heads if edit.heads.dim() == 2 else edit.heads[None])[:, :, None, None]


def positions(rule: ScoreRule) -> tuple[Int[Tensor, "query 1"], Int[Tensor, "1 key"]]:
    """Absolute positions of the queries and of the keys."""
    mask = rule.mask
    query = torch.arange(mask.queries)[:, None] + mask.query_offset
    return query, torch.arange(mask.keys)[None, :] + mask.key_offset


def edited_scores(scores: Weights, edit: PlainScoreEdit, rule: ScoreRule) -> Weights:
    """One score edit on every head."""
    if isinstance(edit, ScaleScores):
        return edit.tau * scores
    if isinstance(edit, BiasKeys):
        bias = edit.bias.double()
        return scores + (bias[:, None, None, :] if bias.dim() == 2 else bias[:, :, None, :])
    if isinstance(edit, MaskScores):
        index = (torch.arange(n) for n in scores.shape[:2])
        batch, head = (i.reshape(shape) for i, shape in zip(index, ((-1, 1, 1, 1), (-1, 1, 1)), strict=True))
        return torch.where(edit.visible(batch, head, *positions(rule)), scores, -torch.inf)
    pairs = edit.queries[:, None, :, None] & edit.keys[:, None, None, :]
    if isinstance(edit, BlockScores):
        return torch.where(pairs, -torch.inf, scores)
    assert isinstance(edit, EmphasiseScores)
    return torch.where(pairs, scores + edit.amount * scores.abs(), scores)


def edited(weights: Weights, edit: PlainWeightEdit, rule: ScoreRule) -> Weights:
    """One weight edit on every head and row."""
    if isinstance(edit, Rescale):
        keys, to = edit.keys[:, None, None, :], edit.to[:, None, None, :]
        freed = (1 - edit.keep) * (weights * keys).sum(-1, keepdim=True)
        target = (weights * to).sum(-1, keepdim=True)
        per_weight = freed / torch.where(target > NOTHING, target, 1.0)
        moved = torch.where(keys, edit.keep * weights, weights) + torch.where(to, weights, 0.0) * per_weight
        acts = target > NOTHING
        if edit.condition is not None:
            of, within = (
                (weights * group[:, None, None, :]).sum(-1, keepdim=True)
                for group in (edit.condition.of, edit.condition.within)
            )
            acts = (
                acts
                & (of / (within + WITHIN_EPSILON) <= edit.condition.most)
                & (within >= edit.condition.least)
            )
        return torch.where(acts, moved, weights)
    if isinstance(edit, ScaleKeys):
        return torch.where(edit.keys[:, None, None, :], edit.factor * weights, weights)
    if isinstance(edit, Shares):
        return weights.abs() / (weights.abs().sum(-1, keepdim=True) + 1e-8)
    if isinstance(edit, MixIdentity):
        query, key = positions(rule)
        mixed = (query == key).double()[None, None]
        if min(rule.mask.left or 0, rule.mask.right or 0) < 0:
            mixed = mixed * 0.0
        if rule.mask.valid_keys is not None:
            mixed = mixed * rule.mask.valid_keys[:, None, None, :]
    else:
        assert isinstance(edit, MixPattern)
        mixed = pattern(edit.pattern, rule, *weights.shape[:2])
    has_mass = mixed.sum(-1, keepdim=True) > 0
    return torch.where(has_mass, (1 - edit.amount) * weights + edit.amount * mixed, weights)


def pattern(
    kind: Pattern, rule: ScoreRule, batch: int, heads: int
) -> Float[Tensor, "#batch #head query key"]:
    """A fixed pattern as a map; its rows sum to 1, or are zero where it has no mass."""
    query, key = positions(rule)
    seen = visible(rule, batch, heads).double()
    if isinstance(kind, Uniform):
        weights = seen
    elif isinstance(kind, Offset):
        weights = seen * (query - kind.n == key)
    elif isinstance(kind, OnKeys):
        weights = seen * kind.keys[:, None, None, :]
    elif isinstance(kind, OfMap):
        # as it is: its rows may sum to less than 1
        return seen * at_positions(of_map(kind), rule, kind.map.mask.query_offset, kind.map.mask.key_offset)
    elif isinstance(kind, Fixed):
        weights = seen * at_positions(kind.weights.double(), rule, 0, 0)
    else:
        assert isinstance(kind, Matching)
        same = (kind.ids[:, :, None] == kind.ids[:, None, :]).tril(-1).double()[:, None]
        weights = seen * at_positions(same, rule, 0, 0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, 0.0)


def of_map(kind: OfMap) -> Weights:
    """The whole of another map, zero on its rows of padding."""
    other = kind.map
    assert isinstance(other, MapState)
    dense = attend(other.q, other.k, other.k, other.rule, [step.edit for step in other.steps]).weights
    valid = other.mask.valid_queries
    return dense if valid is None else dense * valid[:, None, :, None]


def at_positions(
    weights: Float[Tensor, "#batch #head there_query there_key"],
    rule: ScoreRule,
    first_query: int,
    first_key: int,
) -> Float[Tensor, "#batch #head query key"]:
    """Weights whose rows and columns begin at the given positions, read at the positions of this map; 0 elsewhere."""
    row, column = (
        place.flatten() - first
        for place, first in zip(positions(rule), (first_query, first_key), strict=True)
    )
    i, j = (
        ((place >= 0) & (place < length)).nonzero()[:, 0]
        for place, length in zip((row, column), weights.shape[2:], strict=True)
    )
    found = torch.zeros(*weights.shape[:2], len(row), len(column), dtype=weights.dtype)
    found[:, :, i[:, None], j] = weights[:, :, row[i][:, None], column[j]]
    return found


def statistics(
    dense: Dense, rule: ScoreRule, groups: Bool[Tensor, "group key"] | None = None, window: int = 10
) -> dict[str, Shaped[Tensor, "batch head *numbers"]]:
    """Every statistic by its definition. Rows: NaN where padding or nothing is seen.

    `argmax` is -1 on such rows; `window` clips the distance of `windowed_distance` (tokens).
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
        "distance_squared": row((weights * (query - key).square()).sum(-1)),
        "windowed_distance": row((weights * (query - key).abs().clamp(max=window)).sum(-1)),
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


def received(
    dense: Dense, rule: ScoreRule, queries: Bool[Tensor, "#batch query"] | None = None,
    later: tuple[int, int] | None = None,
) -> tuple[PerKey, Int[Tensor, "batch head key"]]:  # fmt: skip
    """What each key receives from some queries, and how many of them see it.

    `later=(near, far)` leaves the queries that stand near to far positions after
    the key, both ends included. Queries that are padding are in neither.
    """
    batch, heads, rows, keys = dense.weights.shape
    mask = rule.mask
    ahead = (torch.arange(rows) + mask.query_offset)[:, None] - (torch.arange(keys) + mask.key_offset)
    chosen = torch.ones(batch, 1, rows, keys, dtype=torch.bool)
    if later is not None:
        chosen = chosen & (ahead >= later[0]) & (ahead <= later[1])
    for some in (queries, mask.valid_queries):
        if some is not None:
            chosen = chosen & some[:, None, :, None]
    return (dense.weights * chosen).sum(-2), (visible(rule, batch, heads) & chosen).sum(-2)


def at(
    dense: Dense, rule: ScoreRule, columns: Int[Tensor, "batch head query n"]
) -> Float[Tensor, "batch head query n"]:
    """Weights at `columns`, 0 where a column is outside or the row is padding."""
    inside = (columns >= 0) & (columns < dense.weights.shape[-1])
    if rule.mask.valid_queries is not None:
        inside = inside & rule.mask.valid_queries[:, None, :, None]
    one_hot = columns[..., None] == torch.arange(dense.weights.shape[-1])
    return torch.where(inside, torch.einsum("bhqk,bhqnk->bhqn", dense.weights, one_hot.double()), 0.0)
