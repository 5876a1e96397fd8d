"""`prepare`: the work of a normaliser that is done once per call, so that every tile is f(s) * exp(-L) afterwards.

Feature maps and unit norms are applied to queries and keys, in float32 or float64. softmax1 becomes a sink logit of 0
and sinkhorn a bias of the keys: a backend that takes sinks and biases computes both. A prepared rule stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.nn import functional

from headwater.kernels.edits.scores import BiasKeys
from headwater.kernels.rules.normaliser import FEATURES, Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.rules.sinkhorn import potentials
from headwater.kernels.tiles.block import tile_dtype
from headwater.kernels.tiles.shapes import Keys, Queries


def prepare(q: Queries, k: Keys, rule: ScoreRule) -> tuple[Queries, Keys, ScoreRule]:
    """Queries, keys and rule whose tiles are the map of the given rule. ValueError where the rule has no such map."""
    kind = rule.normaliser
    if kind is None:
        return q, k, rule
    high = tile_dtype(q)
    if kind.name == "softmax":
        return q, k, replace(rule, normaliser=None)
    if kind.name == "softmax1":
        given = torch.full((q.shape[1],), -torch.inf, device=q.device) if rule.sinks is None else rule.sinks
        sinks = torch.logaddexp(given.to(high), torch.zeros_like(given, dtype=high))
        return q, k, replace(rule, normaliser=None, sinks=sinks)
    if kind.name == "linear":
        assert kind.features is not None
        phi = FEATURES[kind.features]
        products = Normaliser("products", features=kind.features, normalise=kind.normalise)
        return phi(q.to(high)), phi(k.to(high)), replace(rule, normaliser=products, scale=1.0)
    if kind.name == "lssa":
        seen = rule.mask.visible_keys(q.shape[0], q.shape[1]).to(q.device).clamp_min(1)
        size = math.log(q.shape[-1]) * seen.to(high).log()[..., None]
        q, k = (functional.normalize(x.to(high), dim=-1) for x in (q, k))
        return q * size, k, replace(rule, normaliser=Normaliser("softplus"), scale=1.0)
    if kind.name == "sinkhorn":
        assert kind.iterations is not None
        if reason := _not_bidirectional(rule):
            raise ValueError(
                f"sinkhorn can not compute {reason}; it is for bidirectional attention, whose rows and columns both "
                "sum to a constant"
            )
        rule = replace(rule, normaliser=None)
        bias = BiasKeys(torch.ones(q.shape[1], dtype=torch.bool), potentials(q, k, rule, kind.iterations))
        return q, k, replace(rule, edits=(*rule.edits, bias))
    return q, k, rule


def _not_bidirectional(rule: ScoreRule) -> str | None:
    if rule.mask.left is not None or rule.mask.right is not None:
        return "a causal or windowed mask"
    if rule.mask.extra is not None:
        return "a mask given as a function"
    return None if rule.sinks is None else "learned sinks"
