"""`OwnRule`: attention that a trained model defines itself, by another normaliser or a learned key and value.

Every query sees the learned key. It belongs to no token, so it is not a column of the map. It is a sink whose logit
depends on the query: the weights of a row sum to less than 1, and the learned value is added to the output with the
missing share. The rule is an attribute of the attention module.
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
    """The normaliser (None: softmax), and the learned `key` and `value`, [head, d_head] each (None: not learned)."""

    normaliser: Normaliser | None = None
    key: Tensor | None = None
    value: Tensor | None = None

    def applied(self, q: Tensor, rule: ScoreRule) -> ScoreRule:
        """The rule with the model's normaliser (an edit's goes first) and with the learned key as a sink."""
        if rule.normaliser is None:
            rule = replace(rule, normaliser=self.normaliser)
        if self.key is None:
            return rule
        logits = rule.scale * torch.einsum("bhqd,hd->bhq", q, self.key.to(q))
        if rule.sinks is not None:
            raise ModelError(
                "the model has learned sinks, so it can have no learned key; set kv_bias to false in config.json"
            )
        return replace(rule, sinks=logits)

    def added(self, z: Tensor, map: AttentionMap, rule: ScoreRule) -> Tensor:
        """z plus the learned value times its weight, `exp(sink - lse) * value`; rows that see no key get nothing."""
        if self.value is None or rule.sinks is None:
            return z
        share = torch.exp(rule.sinks.to(map.lse) - map.lse)
        return z + (share[..., None] * self.value.to(share)[:, None]).to(z)


def own_rule(module: nn.Module) -> OwnRule | None:
    """The rule of an attention module; None for the architecture's own."""
    # it is a plain attribute, and torch takes long over one that is not there
    return vars(module).get(ATTRIBUTE)
