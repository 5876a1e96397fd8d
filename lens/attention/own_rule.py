"""A rule of attention that belongs to a model: another normaliser, a learned key and value. Modules carry it.

A learned key is one more key that every query sees. Its value is not the text's, so it is no column of a map: it is a
sink whose logit depends on the query (rows sum to less than 1), and its value is added to the output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.lens.errors import ModelError

ATTRIBUTE = "headwater_rule"


@dataclass(frozen=True, eq=False)
class OwnRule:
    """`key` and `value` are [head, d_head]; None where nothing is learned."""

    normaliser: Normaliser | None = None
    key: Tensor | None = None
    value: Tensor | None = None

    def applied(self, q: Tensor, rule: ScoreRule) -> ScoreRule:
        """The rule with this normaliser, unless an edit brought its own, and with the learned key as a sink."""
        if rule.normaliser is None:
            rule = replace(rule, normaliser=self.normaliser)
        if self.key is None:
            return rule
        logits = rule.scale * torch.einsum("bhqd,hd->bhq", q, self.key.to(q))
        if rule.sinks is not None:
            raise ModelError("a learned key beside learned sinks is not known")
        return replace(rule, sinks=logits)

    def added(self, z: Tensor, map: AttentionMap, rule: ScoreRule) -> Tensor:
        """z with the learned value's part, `exp(sink - L) * value`; rows without weights get nothing."""
        if self.value is None or rule.sinks is None:
            return z
        share = torch.exp(rule.sinks.to(map.lse) - map.lse)
        return z + (share[..., None] * self.value.to(share)[:, None]).to(z)


def own_rule(module: nn.Module) -> OwnRule | None:
    """The rule that a module carries."""
    return getattr(module, ATTRIBUTE, None)
