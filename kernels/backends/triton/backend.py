"""Attention, its products and its statistics through the Triton kernels K1 (rows) and K2 (columns).

`attend` gives the output, the log-sum-exp and any row statistics from one pass. Edited weights take two, one for the
masses of the key classes and one for everything else; or one, where few keys are edited (and one more for statistics).
Linear memory; float16, bfloat16 and float32 with float32 statistics. `why_not` names what can not be done here. The
backward pass recomputes through blocks of rows (`kernels/backends/blocked.py`) under autograd: exact, in linear memory,
at that backend's speed. On the CPU the kernels run under TRITON_INTERPRET=1 alone, slowly, which is how they are
tested.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Bool
from torch import Tensor

from headwater.kernels.backends import blocked, key_classes, score_edits
from headwater.kernels.backends.backend import Backend, Pass
from headwater.kernels.backends.few_keys import Part, joined
from headwater.kernels.backends.key_classes import KeyClasses, classify, fold, mixes, refold
from headwater.kernels.backends.triton.launch import (
    MOST_GROUPS,
    PLANES,
    ROW,
    columns_pass,
    float32_mode,
    interpreted,
    rows_pass,
)
from headwater.kernels.backends.triton.tile_sizes import Config
from headwater.kernels.edits.scores import BiasKeys, BlockScores, ScaleScores
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.shapes import (
    AtKeys,
    AtQueries,
    Groups,
    Keys,
    OverKeys,
    OverQueries,
    PerKey,
    Queries,
    Values,
)  # fmt: skip

MOST_BLOCKS = 15
WIDEST = 256
PIECE = 64  # columns of an operand in one launch


@cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


class Triton(Backend):
    """`tiles` replaces the table of tile sizes."""

    name = "triton"
    # the kernels were held to the reference in the interpreter, never yet on a GPU: "auto" leaves them alone
    of_map = "triton"
    free = tuple(PLANES)

    def __init__(self, tiles: Config | None = None) -> None:
        self.tiles = tiles

    def why_not(
        self, q: Queries, k: Keys, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        transposed: bool = False, value_width: int = 0,
    ) -> str | None:  # fmt: skip
        if not installed():
            return "anything before triton is installed (pip install 'headwater[triton]')"
        if q.device.type not in ("cuda", "cpu"):
            return f"tensors on {q.device.type}"
        if q.device.type == "cpu" and not interpreted():
            return "tensors on the CPU unless TRITON_INTERPRET=1 is set before Python starts"
        if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"{str(q.dtype).removeprefix('torch.')} queries"
        if rule.normaliser is not None:
            return f"{rule.normaliser.name} weights"
        if rule.sinks is not None and rule.sinks.dim() > 1:
            return "sinks whose logit depends on the query"
        if rule.mask.beyond_band:
            return rule.mask.beyond_band
        if q.shape[0] == 0 or rule.mask.queries == 0 or rule.mask.keys == 0:
            return "an empty cache"
        if max(q.shape[-1], value_width) > WIDEST:
            return f"heads wider than {WIDEST}"
        if sum(isinstance(edit, BlockScores) for edit in rule.edits) > MOST_BLOCKS:
            return f"more than {MOST_BLOCKS} blocked sets of pairs"
        if reason := score_edits.why_not(rule.edits) or _unfit_bias(rule):
            return reason
        if reason := key_classes.why_not(edits, rule.mask.keys, q.device):
            return reason
        learned = [x for x in (rule.bias, rule.sinks, rule.alibi) if x is not None and x.requires_grad]
        if learned and torch.is_grad_enabled():
            return "gradients of a score bias, of slopes or of learned sinks"
        return None

    def attend(
        self, q: Queries, k: Keys, v: Values, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        statistics: Sequence[str] = (), groups: Groups | None = None,
    ) -> Pass:  # fmt: skip
        """`statistics` are names of `ROW`, `groups` are the keys of "mass".

        Weights that a pattern is mixed into are measured in blocks of rows (kernels/maps/statistics.py): none of their
        statistics come from here.
        """
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            kept: list[Pass] = []
            z = _Recomputed.apply(self, q, k, v, rule, tuple(edits), (statistics, groups), kept)
            return kept[0]._replace(z=z)
        return self._forward(q, k, v, rule, edits, statistics, groups)

    def _forward(self, q, k, v, rule, edits, names, groups) -> Pass:
        if not edits:
            z, lse, found = rows_pass(q, k, rule, v, None, None, names, groups, self.tiles, "own")
            return Pass(z, lse, (), _finish(found, _silent(lse, rule)))
        classes = classify(edits, rule.mask.keys, q.device)
        if span := classes.few():
            result = self._with_keys_aside(q, k, v, rule, edits, classes, span)
            if mixes(result.steps) or not names:
                return result
            state = MapState.of(q, k, rule, result.lse, result.steps)
            return result._replace(found=self.statistics(state, names, groups))
        _, lse, masses = rows_pass(q, k, rule, None, None, None, ("mass",), classes.groups(), self.tiles)
        live = ~torch.isinf(lse)
        folded, steps = fold(edits, classes, rule, live, masses["mass"].masked_fill(~live[:, :, None], 0.0))
        names = () if folded.mixed else names
        z, _, found = rows_pass(q, k, rule, v, lse, folded, names, groups, self.tiles, "own")
        if folded.mixed:
            z = (z.float() + folded.gather(rule, v.float())).to(v.dtype)
        return Pass(z, lse, steps, _finish(found, _silent(lse, rule)))

    def _with_keys_aside(
        self, q: Queries, k: Keys, v: Values, rule: ScoreRule, edits: Sequence[WeightEdit],
        classes: KeyClasses, span: tuple[int, int],
    ) -> Pass:  # fmt: skip
        """Edits whose sets, but for one, lie on a few neighbouring keys: one walk without them, then they alone."""
        rest, columns = replace(rule, sinks=None), torch.arange(*span, device=q.device)
        if span[0]:
            # in the midst of the others they have to be hidden; at the beginning the walk starts after them
            valid = torch.ones(1, rule.mask.keys, dtype=torch.bool, device=q.device)
            valid[:, columns] = False
            valid = valid if rule.mask.valid_keys is None else valid & rule.mask.valid_keys.to(q.device)
            rest = replace(rest, mask=replace(rule.mask, valid_keys=valid))
        skipped = 0 if span[0] else span[1]
        z, others, _ = rows_pass(
            q, k, rest, v, None, None, (), None, self.tiles, "own", skipped=skipped, wide=True
        )
        result = joined(q, k, v, rule, edits, classes, [Part(classes.most(), z, others)], columns)
        return result._replace(z=result.z.to(v.dtype))

    def gather(self, state: MapState, x: OverKeys) -> AtQueries:
        q, k, rule, lse = state.q, state.k, state.rule, state.lse
        folded = refold(state)
        pieces = [
            rows_pass(q, k, rule, part, lse, folded, (), None, self.tiles, float32_mode(q))[0]
            for part in x.float().split(PIECE, -1)
        ]
        if not pieces:
            return q.new_zeros(*q.shape[:3], 0, dtype=torch.float32)
        found = torch.cat(pieces, -1)
        return found if folded is None else found + folded.gather(rule, x.float())

    def scatter(self, state: MapState, y: OverQueries) -> AtKeys:
        q, k, rule, lse = state.q, state.k, state.rule, state.lse
        folded = refold(state)
        pieces = [
            columns_pass(q, k, rule, lse, folded, part, tiles=self.tiles)[0]
            for part in y.float().split(PIECE, -1)
        ]
        if not pieces:
            return q.new_zeros(*q.shape[:2], k.shape[2], 0, dtype=torch.float32)
        found = torch.cat(pieces, -1)
        if folded is None:
            return found
        return found + folded.scatter(rule, y.float().expand(*q.shape[:2], -1, -1))

    def statistics(
        self, state: MapState, names: Sequence[str], groups: Groups | None = None, window: int = 10
    ) -> dict[str, Tensor] | None:
        """Row statistics in one K1 pass, and "received" in one K2 pass, from a finished forward pass."""
        if mixes(state.steps):
            return None
        q, k, rule, lse = state.q, state.k, state.rule, state.lse
        folded = refold(state)
        found: dict[str, Tensor] = {}
        by_row = [name for name in names if name in ROW]
        if groups is not None:
            groups = groups[None] if groups.dim() == 2 else groups
            for rest in groups.split(MOST_GROUPS, 1)[1:] if "mass" in names else ():
                more = rows_pass(q, k, rule, None, lse, folded, ("mass",), rest, self.tiles)[2]["mass"]
                found["mass"] = torch.cat([found["mass"], more], 2) if "mass" in found else more
            groups = groups[:, :MOST_GROUPS]
        if by_row:
            first = rows_pass(q, k, rule, None, lse, folded, by_row, groups, self.tiles, window=window)[2]
            if "mass" in found:
                first["mass"] = torch.cat([first["mass"], found["mass"]], 2)
            found = _finish(first, torch.isinf(lse))
        if "received" in names:
            found["received"] = columns_pass(q, k, rule, lse, folded, None, tiles=self.tiles)[1]
        return {name: found[name] for name in names}

    def received(
        self,
        state: MapState,
        queries: Bool[Tensor, "#batch query"] | None = None,
        later: tuple[int, int] | None = None,
    ) -> PerKey | None:
        if mixes(state.steps):
            return self._column_sums(state, queries) if later is None else None
        span = None
        if queries is not None:
            rows = queries.any(0).nonzero()[:, 0].tolist()
            span = (rows[0], rows[-1] + 1) if rows else (0, 0)
            # rows that were not chosen are made rows without weights
            state = replace(
                state, lse=state.lse.masked_fill(~queries[:, None].to(state.lse.device), torch.inf)
            )
        q, k, rule, folded = state.q, state.k, state.rule, refold(state)
        return columns_pass(q, k, rule, state.lse, folded, None, span, later, self.tiles)[1]


def _unfit_bias(rule: ScoreRule) -> str | None:
    """Why the biases can not be made the one that the kernels add before they multiply by the temperature."""
    cold = any(isinstance(edit, ScaleScores) and edit.tau <= 0 for edit in rule.edits)
    if any(isinstance(edit, BiasKeys) for edit in rule.edits):
        if cold:
            return "a key bias beside a temperature of 0 or less"
        if rule.bias is not None and rule.bias.shape[2] > 1:
            return "a key bias over a score bias that differs between queries"
    if cold and (rule.bias is not None or rule.alibi is not None):
        return "a temperature of 0 or less over a score bias"
    return None


class _Recomputed(torch.autograd.Function):
    """K1 forward; the backward pass repeats attention in blocks of rows, under autograd."""

    @staticmethod
    def forward(ctx, backend, q, k, v, rule, edits, asked, kept):
        result = backend._forward(q, k, v, rule, edits, *asked)
        kept.append(result)
        ctx.save_for_backward(q, k, v)
        ctx.rule, ctx.edits = rule, edits
        return result.z

    @staticmethod
    def backward(ctx, *gradients):
        with torch.enable_grad():
            q, k, v = inputs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
            z = blocked.attend(q, k, v, ctx.rule, ctx.edits).z
            wanted = [x for x in inputs if x.requires_grad]
            found = iter(torch.autograd.grad(z, wanted, gradients[0].to(z.dtype)))
        return None, *(next(found) if x.requires_grad else None for x in inputs), None, None, None, None


def _silent(lse: Tensor, rule: ScoreRule) -> Tensor:
    silent = torch.isinf(lse)
    if rule.mask.valid_queries is not None:
        silent = silent | ~rule.mask.valid_queries[:, None].to(lse.device)
    return silent


def _finish(found: dict[str, Tensor], silent: Tensor) -> dict[str, Tensor]:
    """NaN (argmax: -1) on the rows that are padding or see no key."""
    for name, values in found.items():
        if name == "argmax":
            values.masked_fill_(silent, -1)
        else:
            values.masked_fill_(silent[:, :, None] if name == "mass" else silent, torch.nan)
    return found
