"""Attention through torch's fused CPU kernel, edits included; it forms the weights of a few keys at most.

Score edits become arguments of the kernel: a temperature scales the queries, biases and blocked keys become a bias per
key, and an edit of some queries alone is a second call, for those if they are a few runs. Weight edits are a factor per
row and class of keys (kernels/backends/key_classes.py). Each class has its own output and log-sum-exp, from a call that
leaves the other keys out, or from single columns where a class has few keys or scores of few keys are edited. The
classes are joined by their masses. Nothing is subtracted, so a row whose weight lies on its sink alone keeps all
digits. A bias that raises a few keys is put on the output of the unedited attention. Patterns that are mixed in are
added as products of their own. Cost: one call per class of more than 16 keys, times the calls that some queries take.
`why_not` names what is left to `blocked`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from headwater.kernels.backends import fused_kernel, key_classes, left_out, score_edits
from headwater.kernels.backends.backend import Backend, Pass
from headwater.kernels.backends.few_keys import Part, joined, raised
from headwater.kernels.backends.key_classes import KeyClasses, classify, own_columns, refold
from headwater.kernels.edits.scores import BiasKeys, BlockScores, ScaleScores
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import tile_dtype
from headwater.kernels.tiles.heads import per_query_head
from headwater.kernels.tiles.shapes import (
    AtKeys,
    AtQueries,
    Keys,
    OverKeys,
    OverQueries,
    PerKey,
    Queries,
    Values,
)  # fmt: skip

MOST_COLUMNS = 16
MOST_RUNS = 4  # of rows that take a call of their own
FEW_ROWS = 16  # times as few as the rest
MOST_CALLS = 6  # beyond that blocks of rows are as fast


class Call(NamedTuple):
    """One way to score: the rows it is for [batch|1, query], factors on the queries [batch|1, head] and key biases."""

    rows: Tensor | None
    factor: Tensor | None
    key_bias: Tensor | None  # [batch|1, head|1, key]


class Flash(Backend):
    name = "flash"
    turn = 1
    reason = "softmax on the CPU"

    def why_not(
        self, q: Queries, k: Keys, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        transposed: bool = False, value_width: int = 0,
    ) -> str | None:  # fmt: skip
        bare = replace(rule, edits=()) if rule.edits else rule
        if reason := fused_kernel.why_not(q, k, bare, transposed):
            return reason
        if not rule.edits and not edits:
            return None
        if reason := score_edits.why_not(rule.edits):
            return reason
        learning = torch.is_grad_enabled()
        for edit in rule.edits:
            if isinstance(edit, BiasKeys) and edit.bias.requires_grad and learning:
                return "gradients of a key bias"
            if isinstance(edit, ScaleScores) and rule.bias is not None and rule.bias.shape[2] > 1:
                return "a temperature under a bias of queries and keys"
        if reason := key_classes.why_not(edits, rule.mask.keys, q.device):
            return reason
        calls = len(_patterns(rule))
        if edits:
            if learning and (q.requires_grad or k.requires_grad):
                return "gradients of edited weights, as its log-sum-exp carries none"
            calls *= len(_large(classify(edits, rule.mask.keys, q.device))[0])
        return f"edits that take {calls} calls of the kernel" if calls > MOST_CALLS else None

    def attend(
        self, q: Queries, k: Keys, v: Values, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        statistics: Sequence[str] = (),
    ) -> Pass:  # fmt: skip
        if not edits and not rule.edits:
            return Pass(*fused_kernel.attend(q, k, v, rule), (), {})
        q, k, v = (_high(x) for x in (q, k, v))
        classes = classify(edits, rule.mask.keys, q.device)
        large, few = _large(classes)
        calls, others = _lower(rule, q), rule  # the calls edit the scores
        single = few | score_edits.touched(rule.edits, rule.mask.keys).to(few.device)
        bare = replace(rule, edits=())
        columns = single.nonzero()[:, 0]
        if not edits and 0 < len(columns) <= MOST_COLUMNS and not _learning(q, k, v):
            bias = score_edits.raised(rule.edits, q)
            if bias is not None:
                z, lse = fused_kernel.attend(q, k, v, bare)
                return raised(q, k, v, bare, bias[..., columns], columns, z, lse)
        without = len(large) == 1 and left_out.takes(bare)
        cheap = without and not _few_rows(calls) and not _learning(q, k, v)
        if rule.edits and len(columns) <= MOST_COLUMNS and (edits or cheap):
            few, others = single, replace(rule, edits=score_edits.of_all_keys(rule.edits))
            calls = _lower(others, q)
        if not edits and (others is rule or not few.any()):
            return Pass(*_attend(calls, q, k, v, rule), (), {})
        parts, columns = [], few.nonzero()[:, 0]
        for c in large:
            if without and len(calls) == 1 and calls[0].key_bias is None and len(columns):
                z, lse = left_out.attend(_scaled(q, calls[0]), k, v, bare, few)
            else:
                hidden = replace(others, sinks=None, mask=_restricted(rule, (classes.of_key == c) & ~few))
                z, lse = _attend(calls, q, k, v, hidden)
            parts.append(Part(c, z, lse))
        return joined(q, k, v, rule, edits, classes, parts, columns)

    def gather(self, state: MapState, x: OverKeys) -> AtQueries:
        rule, lse = state.rule, state.lse
        silent = torch.isinf(lse)[..., None]
        q, k, x = _high(state.q), _high(state.k), _high(x)
        heads = q.shape[1]
        # the kernel wants as many heads of values as of keys
        if x.shape[1] == 1:
            x = x.expand(-1, k.shape[1], -1, -1)
        else:
            k, x = per_query_head(k, heads), per_query_head(x, heads)
        calls = _lower(rule, q)
        folded = refold(state)
        if folded is None:
            return _attend(calls, q, k, x, rule)[0].masked_fill(silent, 0.0)
        kinds = folded.classes.groups().to(x)
        values = torch.cat([x * one[:, None, :, None] for one in kinds.unbind(1)], -1)
        parts = _attend(calls, q, k, values, rule)[0].unflatten(-1, (folded.classes.count, -1))
        found = torch.einsum("bhqcx,bhcq->bhqx", parts, folded.factor.to(parts))
        own = per_query_head(x[:, :, own_columns(rule.mask, x.device)], heads)
        found = found + folded.kept[..., None] * own + folded.gather(rule, x)
        return found.masked_fill(silent, 0.0)

    def scatter(self, state: MapState, y: OverQueries) -> AtKeys:
        rule, lse = state.rule, state.lse
        q, k, y = _high(state.q), _high(state.k), _high(y).expand(-1, state.shape[1], -1, -1)
        folded = refold(state)
        sent = y if folded is None else (folded.factor.mT[..., None].to(y) * y[..., None, :]).flatten(-2)
        found = torch.zeros((), dtype=sent.dtype)
        for call in _lower(rule, q):
            heard = (
                lse if call.rows is None else lse.masked_fill(~call.rows[:, None].to(lse.device), torch.inf)
            )
            plain = replace(rule, edits=())
            found = found + fused_kernel.scatter(_scaled(q, call), k, plain, heard, sent, call.key_bias)
        if folded is None:
            return found
        kinds = folded.classes.groups().to(found)
        found = torch.einsum("bhkcx,bck->bhkx", found.unflatten(-1, (folded.classes.count, -1)), kinds)
        place = torch.arange(rule.mask.queries) + rule.mask.shift
        there = (place >= 0) & (place < rule.mask.keys)
        own = (folded.kept[..., None] * y)[:, :, there]
        return found.index_add(2, place[there].to(found.device), own.to(found)) + folded.scatter(rule, y)

    def received(
        self, state: MapState, queries: Bool[Tensor, "#batch query"] | None, later: tuple[int, int] | None
    ) -> PerKey | None:
        return self._column_sums(state, queries) if later is None else None


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
        acting = [
            edit
            for edit in rule.edits
            if not isinstance(edit, BlockScores) or rows is None or bool((edit.queries & rows).any())
        ]
        calls.append(Call(rows, *score_edits.factor_and_bias(acting, q)))
    return calls


def _attend(calls: Sequence[Call], q: Queries, k: Keys, v: Values, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """z and lse of unedited weights, each row from the call that is for it."""
    if len(calls) == 1:
        return _call(calls[0], q, k, v, rule)
    most, *others = sorted(calls, key=_count, reverse=True)
    z, lse = _call(most, q, k, v, rule)
    whole, learning = slice(0, rule.mask.queries), _learning(q, k, v)
    if learning:
        z, lse = z.clone(), lse.clone()
    for call in others:
        assert call.rows is not None
        # the log-sum-exp of queries that start inside the cache carries no gradients
        for some in [whole] if learning else _runs(call.rows) or [whole]:
            of_some = rule if some == whole else _of_rows(rule, some)
            other, other_lse = _call(call, q[:, :, some], k, v, of_some)
            rows = call.rows[:, None, some].to(z.device)
            z[:, :, some] = torch.where(rows[..., None], other, z[:, :, some])
            lse[:, :, some] = torch.where(rows, other_lse, lse[:, :, some])
    return z, lse


def _few_rows(calls: Sequence[Call]) -> bool:
    """Whether all calls but one, which no bias slows, are for a few rows."""
    most, *others = sorted(calls, key=_count, reverse=True)
    runs = [_runs(call.rows) for call in others if call.rows is not None]
    rows = sum(some.stop - some.start for each in runs for some in each)
    return bool(others) and all(runs) and most.key_bias is None and rows * FEW_ROWS <= _count(most)


def _learning(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _count(call: Call) -> int:
    return 0 if call.rows is None else int(call.rows.sum())


def _runs(rows: Tensor) -> list[slice]:
    """Rows that follow each other and hold all of `rows`, bool [batch|1, query]; [] where they are many runs."""
    some = torch.nn.functional.pad(rows.any(0).to(torch.int8), (1, 1)).diff()
    begins, ends = (some == 1).nonzero()[:, 0].tolist(), (some == -1).nonzero()[:, 0].tolist()
    return [slice(a, b) for a, b in zip(begins, ends, strict=True)] if len(begins) <= MOST_RUNS else []


def _of_rows(rule: ScoreRule, rows: slice) -> ScoreRule:
    """The rule of some rows."""
    mask, bias, sinks = rule.mask, rule.bias, rule.sinks
    real = None if mask.valid_queries is None else mask.valid_queries[:, rows]
    mask = replace(
        mask, queries=rows.stop - rows.start, query_offset=mask.query_offset + rows.start, valid_queries=real
    )
    bias = bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows]
    sinks = sinks if sinks is None or sinks.dim() == 1 or sinks.shape[2] == 1 else sinks[:, :, rows]
    return replace(rule, mask=mask, bias=bias, sinks=sinks)


def _call(call: Call, q: Queries, k: Keys, v: Values, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """The fused kernel with the scores of the call."""
    bias = rule.bias
    if bias is not None and call.factor is not None:
        # a hidden pair stays hidden: 0 * -inf is NaN
        bias = torch.where(bias == -torch.inf, -torch.inf, bias.to(q) * call.factor[..., None, None])
    if call.key_bias is not None:
        bias = call.key_bias[:, :, None] if bias is None else bias.to(q) + call.key_bias[:, :, None]
    return fused_kernel.attend(_scaled(q, call), k, v, replace(rule, bias=bias, edits=()))


def _scaled(q: Tensor, call: Call) -> Tensor:
    return q if call.factor is None else q * call.factor[..., None, None]


def _large(classes: KeyClasses) -> tuple[list[int], Tensor]:
    """The classes that take a call each, and the columns, bool [key], of all others, which together are few."""
    counts = classes.groups().sum(-1).amax(0)
    large = [int(c) for c in counts.argsort(descending=True)]
    few = torch.zeros_like(classes.of_key[0], dtype=torch.bool)
    while len(large) > 1:
        more = few | (classes.of_key == large[-1]).any(0)
        if more.sum() > MOST_COLUMNS:
            break
        few = more
        large.pop()
    return large, few


def _restricted(rule: ScoreRule, keys: Tensor):
    """The mask of the rule over some keys alone, bool [batch|1, key]."""
    valid = keys if rule.mask.valid_keys is None else keys & rule.mask.valid_keys.to(keys.device)
    return replace(rule.mask, valid_keys=valid)


def _high(x: Tensor) -> Tensor:
    return x.to(tile_dtype(x))
