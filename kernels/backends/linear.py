"""Linear attention by running sums of k_j x_j^T in plain torch: O(S·d·c) time, linear memory, no map.

For the map w_ij = q_i·k_j * exp(-L_i) of `linear` attention, whose feature maps are in q and k already, the product
with x is `q_i (sum over visible j of k_j x_j^T)`: Katharopoulos et al. 2020. Behind a causal mask the sum runs along
the sequence, a chunk of rows at a time with the triangle of the chunk itself. It takes causal, cached and bidirectional
masks with padding; `why_not` names the rest, which blocks of rows compute. The transpose is the same sum run backwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headwater.kernels.backends.backend import Backend, Pass
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.heads import per_query_head
from headwater.kernels.tiles.shapes import AtKeys, AtQueries, Keys, OverKeys, OverQueries, Queries, Values

CHUNK = 128  # rows whose own triangle is computed as a tile


class Running(Backend):
    name = "running"
    turn = 2
    reason = "linear attention as running sums"

    def why_not(
        self, q: Queries, k: Keys, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        transposed: bool = False, value_width: int = 0,
    ) -> str | None:  # fmt: skip
        if rule.normaliser is None or rule.normaliser.name != "products":
            return "weights that are no products of features"
        if rule.softcap is not None or rule.bias is not None or rule.alibi is not None or rule.edits:
            return "scores that are no products of features"
        if edits:
            return "edited weights"
        if rule.mask.beyond_band is not None:
            return rule.mask.beyond_band
        return None if rule.mask.left is None else "a sliding window"

    def attend(
        self, q: Queries, k: Keys, v: Values, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        statistics: Sequence[str] = (),
    ) -> Pass:  # fmt: skip
        kind, mask = rule.normaliser, rule.mask
        assert kind is not None
        one = v.new_ones(1, 1, 1, 1).expand(*v.shape[:3], 1)
        sums = _gather(q, k, rule, torch.cat([v, one], -1))
        z, total = sums[..., :-1], sums[..., -1]
        silent = (mask.visible_keys(len(q), 1) == 0).to(q.device).expand_as(total)
        if kind.unnormalised:
            total = torch.ones_like(total)
        elif rule.sink_logits is not None:
            total = total + rule.sink_logits.to(total)
        total = total.abs()
        if kind.features == "identity" and not kind.unnormalised:
            total = total.clamp(min=1)
        silent = silent | (total == 0)
        total = total.masked_fill(silent, 1.0)
        z = (z / total[..., None]).masked_fill(silent[..., None], 0.0)
        return Pass(z, total.log().masked_fill(silent, float("-inf")), (), {})

    def gather(self, state: MapState, x: OverKeys) -> AtQueries:
        return _gather(state.q, state.k, state.rule, x) * torch.exp(-state.lse)[..., None].to(state.q)

    def scatter(self, state: MapState, y: OverQueries) -> AtKeys:
        mask, q = state.mask, state.q
        # sum_i (q_i·k_j) exp(-L_i) y_i: keys take the part of the rows. Key j is seen by the rows from j on, so both
        # sequences are reversed, and the sum runs from the last query down.
        sent = (q * state.rule.scale * torch.exp(-state.lse)[..., None].to(q)).flip(2)
        ahead = None if mask.right is None else mask.queries - mask.keys + mask.shift + mask.right
        keys = per_query_head(state.k, q.shape[1]).flip(2)
        found = _running(keys, sent, y.to(q).flip(2), ahead).flip(2)
        if mask.valid_keys is not None:
            found = found.masked_fill(~mask.valid_keys[:, None, :, None].to(found.device), 0.0)
        return found


def _gather(q: Tensor, k: Tensor, rule: ScoreRule, x: Tensor) -> Tensor:
    mask = rule.mask
    k = k.to(q)
    if mask.valid_keys is not None:
        k = k.masked_fill(~mask.valid_keys[:, None, :, None].to(k.device), 0.0)
    x = x.to(q) if x.shape[1] == 1 else per_query_head(x.to(q), q.shape[1])
    ahead = None if mask.right is None else mask.shift + mask.right
    return _running(q * rule.scale, per_query_head(k, q.shape[1]), x, ahead)


def _running(a: Tensor, b: Tensor, x: Tensor, ahead: int | None) -> Tensor:
    """`sum_j (a_i·b_j) x_j` over the j up to i + ahead (None: over all)."""
    if ahead is None:
        return a @ (b.mT @ x)
    # State S = sum of b_j x_j^T, [batch, head, d, c], over the columns that every row of the chunk sees. A chunk is
    # a @ S, plus its own triangle as a masked tile over the columns that only some of its rows see.
    rows, columns = a.shape[2], b.shape[2]
    state = b[:, :, :0].mT @ x[:, :, :0]
    done, found = 0, []
    for begin in range(0, rows, CHUNK):
        end = min(begin + CHUNK, rows)
        # columns that the first row of the chunk sees, and those that its last row does
        all_see, last_sees = (min(max(i + ahead + 1, 0), columns) for i in (begin, end - 1))
        state = state + b[:, :, done:all_see].mT @ x[:, :, done:all_see]
        done = all_see
        tile = a[:, :, begin:end] @ b[:, :, done:last_sees].mT
        place = torch.arange(begin, end, device=a.device)[:, None] + ahead
        seen = torch.arange(done, last_sees, device=a.device) <= place
        found.append(a[:, :, begin:end] @ state + (tile * seen) @ x[:, :, done:last_sees])
    return torch.cat(found, 2) if found else a.new_zeros(*a.shape[:3], x.shape[-1])
