"""Attention in blocks of whole rows, in plain torch on any device. This backend takes every combination.

A block holds all visible keys of some rows, so scores, softmax, weight edits and statistics are the plain formulas on
it. Memory is one block (about 2 MB per tensor) beside inputs and outputs; arithmetic is float32, or float64 for float64
inputs. Under autograd each block is recomputed in the backward pass, so that the blocks are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwater.kernels.backends.backend import Backend, Pass
from headwater.kernels.edits.mixing import MixHeads
from headwater.kernels.edits.weights import WeightEdit, WeightStep
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.threads import mapped
from headwater.kernels.tiles.block import Block, tile_dtype
from headwater.kernels.tiles.row_blocks import blocks
from headwater.kernels.tiles.shapes import AtKeys, AtQueries, Keys, OverKeys, OverQueries, Queries, Values


class Blocked(Backend):
    name = "blocked"
    turn = 3

    def why_not(self, *_: object, **__: object) -> str | None:
        return None

    def attend(
        self, q: Queries, k: Keys, v: Values, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        statistics: Sequence[str] = (),
    ) -> Pass:  # fmt: skip
        """z carries gradients; lse and the factors of the edits do not."""
        return attend(q, k, v, rule, edits)

    def gather(self, state: MapState, x: OverKeys) -> AtQueries:
        batch, heads, queries, _ = state.shape
        out = state.q.new_zeros(batch, heads, queries, x.shape[-1], dtype=state.dtype)

        def of_block(block: Block) -> tuple[Block, Tensor]:
            return block, state.block(block) @ block.of_maps(x)[:, :, block.columns].to(out)

        for block, part in mapped(of_block, state.row_blocks_of(), out.device):
            out[block.batch, block.heads, block.rows] = part
        return out

    def scatter(self, state: MapState, y: OverQueries) -> AtKeys:
        batch, heads, _, keys = state.shape
        out = state.q.new_zeros(batch, heads, keys, y.shape[-1], dtype=state.dtype)

        def of_block(block: Block) -> tuple[Block, Tensor]:
            return block, state.block(block).mT @ block.of_maps(y)[:, :, block.rows].to(out)

        for block, part in mapped(of_block, state.row_blocks_of(), out.device):
            out[block.batch, block.heads, block.columns] += part
        return out


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    rule: ScoreRule,
    edits: Sequence[WeightEdit] = (),
    differentiable: bool = False,
) -> Pass:
    """z carries gradients; lse and the factors of the edits do if `differentiable`."""
    batch, heads, queries = q.shape[:3]
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    z = q.new_zeros(batch, heads, queries, v.shape[-1], dtype=v.dtype)
    lse = q.new_full((batch, heads, queries), float("-inf"), dtype=tile_dtype(q))
    factors: list[list[Tensor]] = [[] for _ in edits]
    together = rule.mixes or any(isinstance(edit, MixHeads) for edit in edits)

    def of_block(block: Block) -> tuple[Block, tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]]:
        if needs_grad:
            return block, checkpoint(
                _attend_block, q, k, v, rule, edits, block, use_reentrant=False, preserve_rng_state=False
            )
        return block, _attend_block(q, k, v, rule, edits, block)

    every = blocks(batch, range(heads), rule.mask, together=together)
    for block, (out, block_lse, resolved) in (
        map(of_block, every) if needs_grad else mapped(of_block, every, q.device)
    ):
        z[block.batch, block.heads, block.rows] = out.to(z)
        if not differentiable:
            block_lse = block_lse.detach()
            resolved = [tuple(f.detach() for f in kept) for kept in resolved]
        lse[block.batch, block.heads, block.rows] = block_lse
        _store(factors, resolved, block, lse)
    steps = tuple(WeightStep(edit, tuple(kept)) for edit, kept in zip(edits, factors, strict=True))
    return Pass(z, lse, steps, {})


def _attend_block(q: Queries, k: Keys, v: Values, rule: ScoreRule, edits: Sequence[WeightEdit], block: Block):
    """One block of `attend`: its output, its lse and the row factors of each edit."""
    scores = rule.scores(q, k, block)
    lse = rule.row_constant(scores, block)
    row = torch.where(lse == float("-inf"), torch.inf, lse)[..., None]
    weights = torch.exp(scores - row) if rule.normaliser is None else rule.normaliser.weights(scores, row)
    live = lse > float("-inf")
    resolved = []
    for edit in edits:
        found = edit.resolve(weights, block, rule.mask, live)
        weights = edit.apply(weights, found, block, rule.mask)
        resolved.append(found)
    values = v[block.batch][:, block.heads // (q.shape[1] // v.shape[1]), block.columns].to(weights)
    return weights @ values, lse, resolved


def _store(
    factors: list[list[Tensor]], resolved: list[tuple[Tensor, ...]], block: Block, like: Tensor
) -> None:
    for kept, found in zip(factors, resolved, strict=True):
        if not kept:
            kept.extend(torch.full_like(like, torch.nan) for _ in found)
        for target, value in zip(kept, found, strict=True):
            target[block.batch, block.heads, block.rows] = value.to(target)
