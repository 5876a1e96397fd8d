"""`Repeated`: attention of layer after layer under one plain rule, where only the numbers differ.

A model calls attention once in each layer, with one mask, one scale and tensors of one form. Whether they fit each
other and which backend computes them comes out the same each time, and for a few tokens finding it takes longer than
the attention. Here it is found once; `attend` then goes straight to torch's fused kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from headwater.kernels.backends import fused_kernel
from headwater.kernels.backends.choose import BACKENDS, choose
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.fits import check_fit
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.shapes import Keys, Output, PerQuery, Queries, Values


class Repeated(NamedTuple):
    """A rule, and whether the kernel hides later keys itself; for tensors of the form that it was made for.

    >>> import torch
    >>> from headwater.kernels.repeated import Repeated
    >>> from headwater.kernels.rules.rule import ScoreRule
    >>> from headwater.kernels.tiles.mask import Mask
    >>> q, k, v = torch.randn(3, 1, 2, 5, 4)  # batch 1, 2 heads, 5 positions, d_head 4
    >>> with torch.no_grad():
    ...     layers = Repeated.of(q, k, v, ScoreRule(scale=0.5, mask=Mask(5, 5, right=0)))
    ...     z, lse = layers.attend(q, k, v)
    >>> z.shape, layers.map(q, k, lse).shape
    (torch.Size([1, 2, 5, 4]), (1, 2, 5, 5))
    """

    rule: ScoreRule
    causal: bool

    @classmethod
    def of(
        cls, q: Queries, k: Keys, v: Values, rule: ScoreRule, statistics: Sequence[str] = ()
    ) -> Repeated | None:
        """For layers of which `statistics` will be asked. None where `attend` of kernels/attend.py does more than one
        call of the fused kernel, or gradients may be tracked."""
        if torch.is_grad_enabled() or rule.normaliser is not None or rule.edits or v.dtype != q.dtype:
            return None
        check_fit(q, k, v, rule)
        # whether the compiled loops take a layer depends on its numbers
        if BACKENDS["compiled"].pays(q, k, rule, statistics):
            return None
        if choose(q, k, rule, value_width=v.shape[-1], statistics=statistics).backend.name != "flash":
            return None
        causal = fused_kernel.one_call(rule)
        return None if causal is None else cls(rule, causal)

    def attend(self, q: Queries, k: Keys, v: Values) -> tuple[Output, PerQuery]:
        """z and the log-sum-exp."""
        return fused_kernel.call(q, k, v, self.causal, None, self.rule.scale)

    def map(self, q: Queries, k: Keys, lse: PerQuery) -> AttentionMap:
        return AttentionMap.of(q.detach(), k.detach(), self.rule, lse)
