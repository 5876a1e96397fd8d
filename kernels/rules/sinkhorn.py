"""Sinkhorn potentials of doubly stochastic attention in linear memory (Sinkformers, Sander et al. 2022, and its code).

With uniform marginals over the n real queries and the m real keys, in the log domain, from v = 0 on and ending with u:

    u_i = -ln n - logsumexp_j(s_ij + v_j)
    v_j = -ln m - logsumexp_i(s_ij + u_i)

The map n * exp(s + u + v) is then the softmax of s + v over the keys, so only v is kept, as a bias of the keys. Rows
sum to 1 exactly, columns to n/m in the limit. One iteration is the softmax itself. Rows that see no key and keys that
no row sees take no part. Cost: one pass over the scores for every two iterations, in blocks of rows. Autograd goes
through all iterations and costs as much again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.threads import mapped
from headwater.kernels.tiles.block import Block, tile_dtype
from headwater.kernels.tiles.mask import HIDDEN
from headwater.kernels.tiles.row_blocks import blocks
from headwater.kernels.tiles.shapes import Keys, PerKey, Queries


def potentials(q: Queries, k: Keys, rule: ScoreRule, iterations: int) -> PerKey:
    """v after an odd number of iterations, float32 (float64 for float64 queries); 0 on hidden keys.

    `rule` is that of the plain softmax; its scores are taken after its edits.
    """
    batch, heads, _, keys = *q.shape[:3], k.shape[2]
    found = torch.zeros(batch, heads, keys, dtype=tile_dtype(q), device=q.device)
    for _ in range(iterations // 2):
        found = _round(q, k, rule, found)
    return found


def _round(q: Tensor, k: Tensor, rule: ScoreRule, v: Tensor) -> Tensor:
    """The next v: rows and columns normalised once."""
    batch, heads = q.shape[:2]
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    sums: dict[tuple[int, int], tuple[Block, Tensor]] = {}

    def of_block(block: Block) -> tuple[Block, Tensor]:
        if needs_grad:
            return block, checkpoint(
                _columns, q, k, rule, v, block, use_reentrant=False, preserve_rng_state=False
            )
        return block, _columns(q, k, rule, v, block)

    every = blocks(batch, range(heads), rule.mask)
    for block, part in map(of_block, every) if needs_grad else mapped(of_block, every, q.device):
        place = (block.batch.start, int(block.heads[0]))
        before = sums.get(place)
        # blocks of other rows see the same columns: their log-sum-exps are joined. Not in place, for autograd
        sums[place] = (block, part if before is None else torch.logaddexp(before[1], part))
    mask = rule.mask
    real = torch.tensor([mask.keys]) if mask.valid_keys is None else mask.valid_keys.sum(-1)
    log_keys = real.clamp_min(1).to(v).log()[:, None, None]
    found = torch.zeros_like(v)
    for block, total in sums.values():
        unseen = total == HIDDEN
        # v_j = -ln m - logsumexp_i(s_ij + u_i)
        found[block.batch, block.heads] = (
            -block.of_batch(log_keys) - total.masked_fill(unseen, 0.0)
        ).masked_fill(unseen, 0.0)
    return found


def _columns(q: Tensor, k: Tensor, rule: ScoreRule, v: Tensor, block: Block) -> Tensor:
    """logsumexp_i(s_ij + u_i) over the rows of the block, [batch, head, key]; u follows from v row by row."""
    scores = rule.scores(q, k, block)
    rows = (scores + block.of_maps(v)[:, :, None]).logsumexp(-1)
    silent = rows == HIDDEN
    mask = rule.mask
    real = torch.tensor([mask.queries]) if mask.valid_queries is None else mask.valid_queries.sum(-1)
    log_queries = block.of_batch(real.clamp_min(1).to(rows).log())[:, None, None]
    if mask.valid_queries is not None:
        silent = silent | ~block.of_rows(mask.valid_queries[:, None]).to(rows.device)
    # u_i = -ln n - logsumexp_j(s_ij + v_j); -inf takes a row out of the sum over the rows
    u = (-log_queries - rows.masked_fill(silent, 0.0)).masked_fill(silent, HIDDEN)
    return (scores + u[..., None]).logsumexp(-2)
