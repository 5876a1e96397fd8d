"""Attention by compiled loops on the CPU, with the statistics of its map from the same walk: `kernels/compiled/`.

The fused kernel gives z and the log-sum-exp, and statistics take a second walk over scores and exponentials. Here a
score is computed once. The fused kernel also knows no windows; here what a window hides is passed by. So `auto` asks
for it, where the extra `fast` is installed, if statistics are wanted of a long map or a window lies over it. z differs
from that of a pass without statistics by rounding. Gradients and edits are left to other backends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from headwater.kernels.backends import fused_kernel
from headwater.kernels.backends.backend import Backend, Pass
from headwater.kernels.compiled import walks
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import tile_dtype
from headwater.kernels.tiles.shapes import AtKeys, AtQueries, Keys, OverKeys, OverQueries, Queries, Values

SINGLE = {"self", "previous", "first"}  # weights of one pair of each row, which need no walk
WINDOWED = 2**24  # pairs under a window, below which the loops are not worth being compiled for z alone
FEW = 16  # queries: for fewer the keys are not worth being put into panels


class Compiled(Backend):
    name = "compiled"
    turn = 0
    reason = "softmax on the CPU with statistics, or behind a window"
    free = (
        "entropy", "max", "argmax", "self", "previous", "first", "distance", "distance_squared", "row_mass", "received",
    )  # fmt: skip

    def pays(self, q: Queries, k: Keys, rule: ScoreRule, statistics: Sequence[str] | None) -> bool:
        pairs = math.prod(q.shape[:3]) * k.shape[2]
        if statistics is None or q.shape[2] < FEW or pairs < walks.LEAST:
            return False
        walked = bool(set(statistics) & (set(self.free) - SINGLE))
        return (walked or (pairs >= WINDOWED and fused_kernel.windowed(rule))) and walks.loops() is not None

    def why_not(
        self, q: Queries, k: Keys, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        transposed: bool = False, value_width: int = 0,
    ) -> str | None:  # fmt: skip
        if walks.loops() is None:
            return "anything before numba is installed (pip install 'headwater[fast]')"
        if q.device.type != "cpu":
            return f"tensors on {q.device.type}"
        if tile_dtype(q) != torch.float32:
            return "float64 queries"
        if transposed:
            return "the transpose"
        learned = (q, k) if rule.sinks is None else (q, k, rule.sinks)
        if torch.is_grad_enabled() and any(x.requires_grad for x in learned):
            return "gradients"
        if rule.edits or edits:
            return "edited scores" if rule.edits else "edited weights"
        if rule.normaliser is not None:
            return f"{rule.normaliser.name} weights"
        for name, given in (
            ("soft-capped scores", rule.softcap), ("a score bias", rule.bias), ("ALiBi", rule.alibi),
            ("a scale of 0 or below", None if rule.scale > 0 else rule.scale),
            (rule.mask.beyond_band, rule.mask.beyond_band),
        ):  # fmt: skip
            if given is not None:
                return name
        if not q.numel() or not k.numel():
            return "an empty cache"
        if walks.ends(rule.mask) is None:
            return "padding between keys"
        largest = [torch.stack(x.detach().aminmax()).abs().amax().float() for x in (q, k)]
        fits = (largest[0] * largest[1] * q.shape[-1]).isfinite()
        return None if fits else "queries or keys that are NaN, infinite or so large that scores may overflow"

    def attend(
        self, q: Queries, k: Keys, v: Values, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        statistics: Sequence[str] = (),
    ) -> Pass:  # fmt: skip
        if torch.is_grad_enabled() and v.requires_grad:
            raise ValueError("compiled can not compute gradients; use backend='blocked'")
        batch, heads, queries, _ = q.shape
        found = {
            name: torch.zeros(
                batch, heads, k.shape[2] if name == "received" else queries,
                dtype=torch.long if name == "argmax" else torch.float32,
            )
            for name in statistics
        }  # fmt: skip
        z, lse = walks.walk(q, k, v, rule, statistics, found, 0)
        silent = torch.isinf(lse)
        if rule.mask.valid_queries is not None:
            silent |= ~rule.mask.valid_queries.cpu()[:, None]
        if silent.any():
            for name, values in found.items():
                if name != "received":
                    values.masked_fill_(silent, -1 if name == "argmax" else torch.nan)
        return Pass(z, lse, (), found)

    def gather(self, state: MapState, x: OverKeys) -> AtQueries:
        """Never asked: `of_map` leaves products to others."""
        raise NotImplementedError

    def scatter(self, state: MapState, y: OverQueries) -> AtKeys:
        """Never asked: `of_map` leaves products to others."""
        raise NotImplementedError
