"""Attention in blocks of whole rows, in plain torch on any device: the backend that can do every combination.

A block holds all visible keys of some rows, so scores, softmax, weight edits and statistics are the plain formulas on
it. Memory is one block (about 2 MB per tensor) beside inputs and outputs; arithmetic is float32, or float64 for float64
inputs. Under autograd each block is recomputed in the backward pass, so that the blocks are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwater.kernels.edits import WeightEdit, WeightStep
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import Block

BLOCK_ELEMENTS = 2**19  # 2 MB of float32, which stays in a core's cache


def blocks(
    batch: int, heads: Sequence[int] | Tensor, rule: ScoreRule, elements: int | None = None
) -> Iterator[Block]:
    """Cover all rows of the chosen heads; few rows and one head at a time where rows are long."""
    heads = torch.as_tensor(heads)
    queries, keys = rule.mask.queries, max(rule.mask.keys, 1)
    budget = BLOCK_ELEMENTS if elements is None else elements
    rows = min(queries, max(budget // keys, 16)) or 1
    per_head = max(budget // (rows * keys), 1)
    for b in range(0, batch, step := max(per_head // max(len(heads), 1), 1)):
        for chunk in heads.split(min(per_head, max(len(heads), 1))):
            for i in range(0, queries, rows):
                span = slice(i, min(i + rows, queries))
                yield Block(
                    slice(b, min(b + step, batch)),
                    chunk,
                    span,
                    slice(*rule.mask.key_span(span.start, span.stop)),
                )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: ScoreRule,
    edits: Sequence[WeightEdit] = (),
    differentiable: bool = False,
) -> tuple[Tensor, Tensor, tuple[WeightStep, ...]]:
    """Output z [batch, head, query, d_value], lse [batch, head, query] and the weight edits with their row factors.

    A row that sees no key gives zero output and lse -inf. z carries gradients; lse and factors do if `differentiable`.
    """
    batch, heads, queries = q.shape[:3]
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    z = q.new_zeros(batch, heads, queries, v.shape[-1], dtype=v.dtype)
    lse = q.new_full((batch, heads, queries), float("-inf"), dtype=high)
    factors: list[list[Tensor]] = [[] for _ in edits]
    for block in blocks(batch, range(heads), rule):
        if needs_grad:
            out, block_lse, resolved = checkpoint(
                attend_block, q, k, v, rule, edits, block, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out, block_lse, resolved = attend_block(q, k, v, rule, edits, block)
        z[block.batch, block.heads, block.rows] = out.to(z)
        if not differentiable:
            block_lse, resolved = block_lse.detach(), [tuple(f.detach() for f in kept) for kept in resolved]
        lse[block.batch, block.heads, block.rows] = block_lse
        _store(factors, resolved, block, lse)
    steps = tuple(WeightStep(edit, tuple(kept)) for edit, kept in zip(edits, factors, strict=True))
    return z, lse, steps


def attend_block(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, edits: Sequence[WeightEdit], block: Block):
    """One block of `attend`: its output, its lse and the row factors of each edit."""
    scores = rule.scores(q, k, block.rows, block.columns, block.batch, block.heads)
    lse = rule.row_constant(scores, block)
    row = torch.where(lse == float("-inf"), torch.inf, lse)[..., None]
    weights = torch.exp(scores - row) if rule.normaliser is None else rule.normaliser.weights(scores, row)
    live = lse > float("-inf")
    resolved = []
    for edit in edits:
        found = edit.resolve(weights, block, rule.mask, live)
        weights = edit.apply(weights, found, block, rule.mask)
        resolved.append(found)
    group = q.shape[1] // k.shape[1]
    values = v[block.batch][:, block.heads // group, block.columns].to(weights)
    return weights @ values, lse, resolved


def log_weights(q: Tensor, k: Tensor, rule: ScoreRule, lse: Tensor, block: Block) -> Tensor:
    """Logarithms of the unedited weights of any tile, -inf where hidden; a new tensor that may be written to.

    Of signed weights it gives the logarithms of their sizes.
    """
    scores = rule.scores(q, k, block.rows, block.columns, block.batch, block.heads)
    row = lse[block.batch][:, block.heads, block.rows].to(scores)[..., None]
    if rule.normaliser is not None:
        logs = rule.normaliser.logs(scores) - row
        return logs.clamp(max=0) if rule.normaliser.bounded else logs
    if scores.requires_grad:
        return (scores - row).clamp(max=0)
    # no weight exceeds 1: at scores of 1e4 the rounding of another kernel's lse would say otherwise
    return scores.sub_(row).clamp_(max=0)


def weights(
    q: Tensor, k: Tensor, rule: ScoreRule, lse: Tensor, steps: Sequence[WeightStep], block: Block
) -> Tensor:
    """Edited weights of any tile [batch, head, row, column], from the stored lse and row factors.

    `lse` is +inf on the rows that have no weights (padding, or every key hidden): they come out as zeros.
    """
    if rule.normaliser is None:
        tile = log_weights(q, k, rule, lse, block).exp_()
    else:
        scores = rule.scores(q, k, block.rows, block.columns, block.batch, block.heads)
        row = lse[block.batch][:, block.heads, block.rows].to(scores)[..., None]
        tile = rule.normaliser.weights(scores, row)
    for step in steps:
        factors = tuple(f[block.batch][:, block.heads, block.rows].to(tile) for f in step.factors)
        tile = step.edit.apply(tile, factors, block, rule.mask)
    if steps:
        # a row of padding has factors, but takes part in nothing
        silent = torch.isposinf(lse[block.batch][:, block.heads, block.rows])
        tile = tile.masked_fill(silent[..., None], 0.0)
    return tile


def _store(
    factors: list[list[Tensor]], resolved: list[tuple[Tensor, ...]], block: Block, like: Tensor
) -> None:
    for kept, found in zip(factors, resolved, strict=True):
        if not kept:
            kept.extend(torch.full_like(like, torch.nan) for _ in found)
        for target, value in zip(kept, found, strict=True):
            target[block.batch, block.heads, block.rows] = value.to(target)
