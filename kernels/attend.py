"""Attention as a model's forward pass calls it: the output, and the operator of its attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from headwater.kernels.backends import blocked
from headwater.kernels.backends.choose import choose
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.fits import check_fit
from headwater.kernels.rules.prepare import prepare
from headwater.kernels.rules.rule import ScoreRule, detached
from headwater.kernels.tiles.shapes import Keys, Output, Queries, Values


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    rule: ScoreRule,
    edits: Sequence[WeightEdit] = (),
    backend: str = "auto",
    statistics: Sequence[str] = (),
    differentiable: bool = False,
) -> tuple[Output, AttentionMap]:
    """z in v's dtype, and the map. Rows without a visible key give zero output.

    `statistics` are names that the caller will ask of the map: a backend that gets them from the same pass keeps them.
    z always carries gradients. The map does if `differentiable`: its products and statistics then hold a graph of the
    size of the whole map, and come from blocks of rows, as fused kernels have no gradient of their log-sum-exp.

    >>> import torch
    >>> from headwater.kernels.attend import attend
    >>> from headwater.kernels.rules.rule import ScoreRule
    >>> from headwater.kernels.tiles.mask import Mask
    >>> q, k, v = torch.randn(3, 1, 2, 5, 4)  # batch 1, 2 heads, 5 positions, d_head 4
    >>> z, map = attend(q, k, v, ScoreRule(scale=0.5, mask=Mask(5, 5, right=0)))
    >>> z.shape, map.shape
    (torch.Size([1, 2, 5, 4]), (1, 2, 5, 5))
    """
    check_fit(q, k, v, rule, edits)
    given = q, k, rule
    q, k, rule = prepare(q, k, rule)
    # compiled loops give no gradients
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    wanted = None if learning or differentiable else statistics
    chosen = choose(q, k, rule, edits, backend, value_width=v.shape[-1], statistics=wanted).backend
    if differentiable:
        if backend not in ("auto", "blocked"):
            raise ValueError(f"{backend} can not compute a differentiable map; use backend='blocked'")
        z, lse, steps, _ = blocked.attend(q, k, v, rule, edits, differentiable=True)
        return z.to(v.dtype), AttentionMap.of(q, k, rule, lse, steps, "blocked")
    of_q, of_k, of_rule = (q, k, rule) if chosen.prepared else given
    wanted = [name for name in statistics if name in chosen.free]
    z, lse, steps, known = chosen.attend(of_q, of_k, v, of_rule, edits, wanted)
    steps = tuple(replace(step, edit=detached(step.edit)) for step in steps)
    map = AttentionMap.of(q.detach(), k.detach(), rule.detached(), lse.detach(), steps, chosen.of_map, known)
    return z.to(v.dtype), map
