"""Edits of scores and weights in the fused kernel: no weight is formed but those of a few keys.

Score edits become what the kernel takes: a temperature scales the queries, biases and blocked keys are added to the
scores of a key, and what acts on some queries alone is a second call whose rows are chosen afterwards. Weight edits are
a factor per row and class of keys (kernels/backends/key_classes.py). Each class has its own output and log-sum-exp,
from a call that hides the other keys, or from its columns where they are few; they are joined by their masses. Nothing
is ever subtracted, so a row that looks at its sink alone keeps all digits. Patterns that are mixed in are added as
products of their own. Cost: one call per class of more than 16 keys, times the calls that some queries take. `refuses`
names what is left to `blocked`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from headwater.kernels.backends import flash
from headwater.kernels.backends.key_classes import (
    MOST_CLASSES,
    Folded,
    KeyClasses,
    classify,
    fold,
    per_batch_row,
)
from headwater.kernels.edits import (
    BiasKeys,
    BlockScores,
    MixIdentity,
    MixPattern,
    Rescale,
    ScaleScores,
    WeightEdit,
    WeightStep,
)
from headwater.kernels.rules.rule import ScoreRule

MOST_COLUMNS = 16
MOST_CALLS = 6  # beyond that blocks of rows are as fast


class Call(NamedTuple):
    """One way to score: the rows it is for [batch|1, query], factors on the queries [batch|1, head] and key biases."""

    rows: Tensor | None
    factor: Tensor | None
    key_bias: Tensor | None  # [batch|1, head|1, key]


def refuses(
    rule: ScoreRule,
    q: Tensor,
    edits: Sequence[WeightEdit] = (),
    transposed: bool = False,
    k: Tensor | None = None,
) -> str | None:
    """Why this combination can not be computed here, or None where it can; `k` matters where it learns."""
    if not rule.edits and not edits:
        return flash.refuses(rule, q, transposed, k)
    if reason := flash.refuses(replace(rule, edits=()), q, transposed, k):
        return reason
    learning = torch.is_grad_enabled()
    for edit in rule.edits:
        if not isinstance(edit, ScaleScores | BiasKeys | BlockScores):
            return f"the score edit {type(edit).__name__}"
        if isinstance(edit, BiasKeys) and edit.bias.requires_grad and learning:
            return "gradients of a key bias"
        if isinstance(edit, ScaleScores) and rule.bias is not None and rule.bias.shape[2] > 1:
            return "a temperature under a bias of queries and keys"
    calls = len(_patterns(rule))
    for edit in edits:
        if not isinstance(edit, Rescale | MixIdentity | MixPattern):
            return f"the weight edit {type(edit).__name__}"
    if edits:
        if learning and (q.requires_grad or (k is not None and k.requires_grad)):
            return "gradients of edited weights, as its log-sum-exp carries none"
        classes = classify(edits, rule.mask.keys, q.device)
        if classes.count > MOST_CLASSES:
            return f"edits of more than {MOST_CLASSES} classes of keys"
        calls *= len(_large(classes)[0])
    if calls > MOST_CALLS:
        return f"edits that take {calls} calls of the kernel"
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, edits: Sequence[WeightEdit] = ()
) -> tuple[Tensor, Tensor, tuple[WeightStep, ...]]:
    """z [batch, head, query, d_value], lse [batch, head, query] and the weight edits with their row factors."""
    if reason := refuses(rule, q, edits, k=k):
        raise ValueError(f"flash can not compute {reason}; use backend='blocked'")
    if not edits and not rule.edits:
        return (*flash.attend(q, k, v, rule), ())
    q, k, v = (_high(x) for x in (q, k, v))
    calls = _lower(rule, q)
    if not edits:
        return (*_chosen(calls, [flash.attend(*_scored(call, q, k, rule, v)) for call in calls]), ())
    classes = classify(edits, rule.mask.keys, q.device)
    large, few = _large(classes)
    bare, parts = replace(rule, sinks=None), []
    for c in large:
        hidden = replace(bare, mask=_restricted(bare, (classes.of_key == c) & ~few))
        parts.append(_chosen(calls, [flash.attend(*_scored(call, q, k, hidden, v)) for call in calls]))
    columns = few.nonzero()[:, 0]
    scores = _columns(calls, q, k, bare, columns)
    logs = [part[1] for part in parts] + [scores.logsumexp(-1)]
    lse = torch.stack(logs).logsumexp(0)
    live = lse > -math.inf
    if rule.sinks is not None:
        assert rule.sink_logits is not None
        lse = torch.where(live, torch.logaddexp(lse, rule.sink_logits.to(lse).expand_as(lse)), lse)
    row = torch.where(live, lse, math.inf)
    weights = torch.exp(scores - row[..., None])
    inside = classes.of_key[:, columns]
    masses = torch.einsum(
        "bhqk,bck->bhcq", weights, _one_hot(inside, classes.count).to(weights).expand(len(q), -1, -1)
    )
    for c, (_, part) in zip(large, parts, strict=True):
        masses[:, :, c] += torch.exp(part - row)
    folded, steps = fold(edits, classes, rule, live, masses)
    place = inside.long()[:, None, :, None].expand(*q.shape[:2], -1, q.shape[2])
    z = (weights * folded.factor.gather(2, place).mT) @ _per_head(v[:, :, columns], q)
    z += folded.gather(rule, v)
    for c, (output, part) in zip(large, parts, strict=True):
        z += (folded.factor[:, :, c] * torch.exp(part - row))[..., None] * output
    return z + folded.kept[..., None] * _per_head(_own(v, rule), q), lse, steps


def gather(
    q: Tensor, k: Tensor, rule: ScoreRule, lse: Tensor, steps: Sequence[WeightStep], x: Tensor
) -> Tensor:
    """`P @ x` for x [batch, head|1, key, c] → [batch, head, query, c]; rows whose lse is infinite see nothing."""
    silent = torch.isinf(lse)[..., None]
    q, k, x = _high(q), _high(k), _high(x)
    # the kernel wants as many heads of values as of keys
    k, x = (k, x.expand(-1, k.shape[1], -1, -1)) if x.shape[1] == 1 else (_per_head(k, q), _per_head(x, q))
    calls = _lower(rule, q)

    def unedited(values: Tensor) -> Tensor:
        found = [flash.attend(*_scored(call, q, k, rule, values))[0] for call in calls]
        return _chosen(calls, [(z, lse) for z in found])[0]

    if not steps:
        return unedited(x).masked_fill(silent, 0.0)
    folded = _refold(rule, steps, lse)
    kinds = _one_hot(folded.classes.of_key, folded.classes.count).to(x)
    parts = unedited(torch.cat([x * one[:, None, :, None] for one in kinds.unbind(1)], -1))
    parts = parts.unflatten(-1, (folded.classes.count, -1))
    found = torch.einsum("bhqcx,bhcq->bhqx", parts, folded.factor.to(parts))
    found = found + folded.kept[..., None] * _per_head(_own(x, rule), q) + folded.gather(rule, x)
    return found.masked_fill(silent, 0.0)


def scatter(
    q: Tensor, k: Tensor, rule: ScoreRule, lse: Tensor, steps: Sequence[WeightStep], y: Tensor
) -> Tensor:
    """`P^T @ y` for y [batch, head, query, c] → [batch, head, key, c]; rows whose lse is infinite give nothing."""
    q, k, y = _high(q), _high(k), _high(y)
    folded = _refold(rule, steps, lse) if steps else None
    sent = y if folded is None else (folded.factor.mT[..., None].to(y) * y[..., None, :]).flatten(-2)
    found = torch.zeros((), dtype=sent.dtype)
    for call in _lower(rule, q):
        heard = lse if call.rows is None else lse.masked_fill(~call.rows[:, None].to(lse.device), math.inf)
        found = found + flash.scatter(
            _scaled(q, call), k, replace(rule, edits=()), heard, sent, call.key_bias
        )
    if folded is None:
        return found
    kinds = _one_hot(folded.classes.of_key, folded.classes.count).to(found)
    found = torch.einsum("bhkcx,bck->bhkx", found.unflatten(-1, (folded.classes.count, -1)), kinds)
    place = torch.arange(rule.mask.queries) + rule.mask.shift
    there = (place >= 0) & (place < rule.mask.keys)
    own = (folded.kept[..., None] * y)[:, :, there]
    return found.index_add(2, place[there].to(found.device), own.to(found)) + folded.scatter(rule, y)


def _patterns(rule: ScoreRule) -> list[Tensor | None]:
    """The sets of rows that some blocked pairs are for, and the rest; [None] where all rows are scored alike."""
    rows: list[Tensor | None] = [None]
    for edit in rule.edits:
        if isinstance(edit, BlockScores) and not edit.queries.all():
            rows = [
                part if old is None else part & old for old in rows for part in (edit.queries, ~edit.queries)
            ]
            rows = [part for part in rows if part is not None and part.any()]
    return rows


def _lower(rule: ScoreRule, q: Tensor) -> list[Call]:
    """The score edits in their order, for each set of rows."""
    calls = []
    for rows in _patterns(rule):
        factor: Tensor | None = None
        bias: Tensor | None = None
        for edit in rule.edits:
            heads = per_batch_row(edit.heads).to(q.device)
            if isinstance(edit, ScaleScores):
                tau = torch.where(heads, q.new_tensor(edit.tau), 1.0)
                factor = tau if factor is None else factor * tau
                if bias is not None:
                    bias = torch.where(bias == -math.inf, bias, bias * tau[..., None])
                continue
            if isinstance(edit, BiasKeys):
                given = edit.bias if edit.bias.dim() == 3 else edit.bias[:, None]
                new = torch.where(heads[..., None], given.to(q), 0.0)
            else:
                assert isinstance(edit, BlockScores)
                acts = rows is None or bool((edit.queries & rows).any())
                hidden = heads[..., None] & edit.keys[:, None].to(q.device) & acts
                new = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -math.inf)
            bias = new if bias is None else bias + new
        calls.append(Call(rows, factor, bias))
    return calls


def _scored(
    call: Call, q: Tensor, k: Tensor, rule: ScoreRule, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, ScoreRule]:
    """Queries, keys, values and the rule without edits, whose scores are those of the call."""
    bias = rule.bias
    if bias is not None and call.factor is not None:
        # a hidden pair stays hidden: 0 * -inf is NaN
        bias = torch.where(bias == -math.inf, -math.inf, bias.to(q) * call.factor[..., None, None])
    if call.key_bias is not None:
        bias = call.key_bias[:, :, None] if bias is None else bias.to(q) + call.key_bias[:, :, None]
    return _scaled(q, call), k, v, replace(rule, bias=bias, edits=())


def _scaled(q: Tensor, call: Call) -> Tensor:
    return q if call.factor is None else q * call.factor[..., None, None]


def _chosen(calls: Sequence[Call], found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Each row from the call that is for it."""
    z, lse = found[0]
    for call, (other, other_lse) in zip(calls[1:], found[1:], strict=True):
        assert call.rows is not None
        rows = call.rows[:, None].to(z.device)
        z, lse = torch.where(rows[..., None], other, z), torch.where(rows, other_lse, lse)
    return z, lse


def _large(classes: KeyClasses) -> tuple[list[int], Tensor]:
    """The classes that take a call each, and the columns, bool [key], of all others, which together are few."""
    counts = _one_hot(classes.of_key, classes.count).sum(-1).amax(0)
    large = [int(c) for c in counts.argsort(descending=True)]
    few = torch.zeros_like(classes.of_key[0], dtype=torch.bool)
    while len(large) > 1:
        more = few | (classes.of_key == large[-1]).any(0)
        if more.sum() > MOST_COLUMNS:
            break
        few = more
        large.pop()
    return large, few


def _columns(calls: Sequence[Call], q: Tensor, k: Tensor, rule: ScoreRule, columns: Tensor) -> Tensor:
    """Masked scores on a few keys, [batch, head, query, column]."""
    mask = rule.mask
    own = torch.arange(mask.queries, device=q.device)[:, None] + mask.shift
    seen = torch.ones(1, 1, mask.queries, len(columns), dtype=torch.bool, device=q.device)
    if mask.left is not None:
        seen = seen & (columns >= own - mask.left)
    if mask.right is not None:
        seen = seen & (columns <= own + mask.right)
    if mask.valid_keys is not None:
        seen = seen & mask.valid_keys[:, None, None, columns].to(q.device)
    keys, found = _per_head(k[:, :, columns], q), []
    for call in calls:
        queries, _, _, scored = _scored(call, q, k, rule, k)
        scores = (queries * rule.scale) @ keys.mT
        if scored.bias is not None:
            bias = scored.bias.to(scores)
            scores = scores + (bias if bias.shape[-1] == 1 else bias[..., columns])
        scores = scores.masked_fill(~seen, -math.inf)
        found.append((scores, scores[..., :0].sum(-1)))
    return _chosen(calls, found)[0]


def _restricted(rule: ScoreRule, keys: Tensor):
    """The mask of the rule over some keys alone, bool [batch|1, key]."""
    valid = keys if rule.mask.valid_keys is None else keys & rule.mask.valid_keys.to(keys.device)
    return replace(rule.mask, valid_keys=valid)


def _refold(rule: ScoreRule, steps: Sequence[WeightStep], lse: Tensor) -> Folded:
    edits = [step.edit for step in steps]
    classes = classify(edits, rule.mask.keys, lse.device)
    return fold(edits, classes, rule, ~torch.isinf(lse), factors=[step.factors for step in steps])[0]


def _one_hot(of_key: Tensor, count: int) -> Tensor:
    """bool [batch|1, class, key]."""
    return of_key[:, None] == torch.arange(count, device=of_key.device)[:, None]


def _own(x: Tensor, rule: ScoreRule) -> Tensor:
    """The value at each query's own position, [batch, head|1, query, c]; any where there is none."""
    place = torch.arange(rule.mask.queries, device=x.device) + rule.mask.shift
    return x[:, :, place.clamp(0, rule.mask.keys - 1)]


def _per_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _high(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
