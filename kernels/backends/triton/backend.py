"""Attention, its products and its statistics through the Triton kernels K1 (rows) and K2 (columns).

`attend` gives the output, the log-sum-exp and any row statistics from one pass. Edited weights take two, one for the
masses of the key classes and one for everything else; or one, where few keys are edited (and one more for statistics).
Linear memory; float16, bfloat16 and float32 with float32 statistics. `refuses` names what can not be done here. The
backward pass recomputes through blocks of rows (`kernels/backends/blocked.py`) under autograd: exact, in linear memory,
at that backend's speed. On the CPU the kernels run under TRITON_INTERPRET=1 alone, slowly, which is how they are
tested.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from headwater.kernels.backends import blocked
from headwater.kernels.backends.key_classes import MOST_CLASSES, Folded, KeyClasses, classify, fold, mixes
from headwater.kernels.backends.triton.launch import (
    MOST_GROUPS,
    ROW,
    columns_pass,
    float32_mode,
    interpreted,
    rows_pass,
)
from headwater.kernels.backends.triton.tile_sizes import Config
from headwater.kernels.edits import (
    BiasKeys,
    BlockScores,
    MixIdentity,
    MixPattern,
    Rescale,
    ScaleScores,
    WeightEdit,
    WeightStep,
)
from headwater.kernels.rules.rule import ScoreRule

MOST_BLOCKS = 15
WIDEST = 256
PIECE = 64  # columns of an operand in one launch


class Pass(NamedTuple):
    """What a forward pass leaves: z, lse [batch, head, query], the weight edits with their factors, row statistics."""

    z: Tensor
    lse: Tensor
    steps: tuple[WeightStep, ...]
    found: dict[str, Tensor]


@cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def refuses(rule: ScoreRule, q: Tensor, edits: Sequence[WeightEdit] = (), value_width: int = 0) -> str | None:
    """Why this combination can not be computed here, or None where it can."""
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
    if strange := [e for e in rule.edits if not isinstance(e, ScaleScores | BlockScores | BiasKeys)]:
        return f"the score edit {type(strange[0]).__name__}"
    if strange := [e for e in edits if not isinstance(e, Rescale | MixIdentity | MixPattern)]:
        return f"the weight edit {type(strange[0]).__name__}"
    if any(isinstance(edit, BiasKeys) for edit in rule.edits) and (reason := _unfit_bias(rule)):
        return reason
    added = rule.bias is not None or rule.alibi is not None
    if added and any(isinstance(e, ScaleScores) and e.tau <= 0 for e in rule.edits):
        return "a temperature of 0 or less over a score bias"
    if edits and classify(edits, rule.mask.keys, q.device).count > MOST_CLASSES:
        return f"edits of more than {MOST_CLASSES} classes of keys"
    learned = [x for x in (rule.bias, rule.sinks, rule.alibi) if x is not None and x.requires_grad]
    if learned and torch.is_grad_enabled():
        return "gradients of a score bias, of slopes or of learned sinks"
    return None


def _unfit_bias(rule: ScoreRule) -> str | None:
    """Why key biases can not be made part of the score bias that the kernels read."""
    if any(isinstance(edit, ScaleScores) and edit.tau <= 0 for edit in rule.edits):
        return "a key bias beside a temperature of 0 or less"
    if rule.bias is not None and rule.bias.shape[2] > 1:
        return "a key bias over a score bias that differs between queries"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: ScoreRule,
    edits: Sequence[WeightEdit] = (),
    names: Sequence[str] = (),
    groups: Tensor | None = None,
    tiles: Config | None = None,
) -> Pass:
    """z, lse and row statistics; zero output and lse -inf on a row without keys.

    `names` are those of `ROW`, `groups` bool [group, key] or [batch, group, key] for "mass". `tiles` replaces the
    table of tile sizes. Weights that a pattern is mixed into are measured in blocks of rows
    (kernels/maps/statistics.py): none of their statistics come from here.
    """
    if reason := refuses(rule, q, edits, v.shape[-1]):
        raise ValueError(f"triton can not compute {reason}; use backend='blocked'")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        kept: list[Pass] = []
        z = _Recomputed.apply(q, k, v, rule, tuple(edits), (names, groups, tiles), kept)
        return kept[0]._replace(z=z)
    return _forward(q, k, v, rule, edits, names, groups, tiles)


def _forward(q, k, v, rule, edits, names, groups, tiles) -> Pass:
    if not edits:
        z, lse, found = rows_pass(q, k, rule, v, None, None, names, groups, tiles, "own")
        return Pass(z, lse, (), _finish(found, _silent(lse, rule)))
    classes = classify(edits, rule.mask.keys, q.device)
    if span := classes.few():
        result = _with_keys_aside(q, k, v, rule, edits, classes, span, tiles)
        silent = _silent(result.lse, rule)
        saved = result.lse.masked_fill(silent, torch.inf)
        names = () if mixes(result.steps) else names
        found = statistics(q, k, rule, saved, result.steps, names, groups, tiles) if names else {}
        return result._replace(found=found)
    _, lse, masses = rows_pass(q, k, rule, None, None, None, ("mass",), classes.groups(), tiles)
    folded, steps = fold(edits, classes, rule, ~torch.isinf(lse), _of_real_rows(masses["mass"], lse))
    names = () if folded.mixed else names
    z, _, found = rows_pass(q, k, rule, v, lse, folded, names, groups, tiles, "own")
    if folded.mixed:
        z = (z.float() + folded.gather(rule, v.float())).to(v.dtype)
    return Pass(z, lse, steps, _finish(found, _silent(lse, rule)))


def _with_keys_aside(
    q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, edits: Sequence[WeightEdit],
    classes: KeyClasses, span: tuple[int, int], tiles: Config | None,
) -> Pass:  # fmt: skip
    """Edits whose sets, but for one, lie on a few neighbouring keys: one walk without them, then they alone.

    Nothing is subtracted, so the output is as exact where these keys hold nearly all mass as where they hold none.
    """
    batch, heads, queries, _ = q.shape
    group, most = heads // v.shape[1], classes.most()
    bare, first = replace(rule, sinks=None), span[0]
    rest = bare
    if first:
        # in the midst of the others they have to be hidden; at the beginning the walk starts after them
        columns = torch.arange(rule.mask.keys, device=q.device)[None]
        valid = (columns < first) | (columns >= span[1])
        valid = valid if rule.mask.valid_keys is None else valid & rule.mask.valid_keys.to(q.device)
        rest = replace(bare, mask=replace(rule.mask, valid_keys=valid))
    skipped = 0 if first else span[1]
    z, others, _ = rows_pass(q, k, rest, v, None, None, (), None, tiles, "own", skipped=skipped, wide=True)
    few = _scores(q, k, bare, span)
    lse = torch.logaddexp(others, few.logsumexp(-1))
    if rule.sinks is not None:
        lse = torch.where(torch.isinf(lse), lse, torch.logaddexp(lse, rule.sinks.to(lse)[:, None]))
    row = torch.where(torch.isinf(lse), torch.inf, lse)
    few, share = torch.exp(few - row[..., None]), torch.exp(others - row)
    inside = classes.of_key[:, span[0] : span[1]]
    onehot = classes.groups()[:, :, span[0] : span[1]].float().expand(batch, -1, -1)
    mass = torch.einsum("bhqk,bck->bhcq", few, onehot)
    mass[:, :, most] += share
    folded, steps = fold(edits, classes, rule, ~torch.isinf(lse), mass)
    place = inside.long()[:, None, :, None].expand(batch, heads, -1, queries)
    few = few * folded.factor.gather(2, place).mT
    z *= (share * folded.factor[:, :, most])[..., None]
    values = v[:, :, span[0] : span[1]].float().repeat_interleave(group, 1)
    z.flatten(0, 1).baddbmm_(few.flatten(0, 1), values.flatten(0, 1))
    if any(isinstance(edit, MixIdentity) for edit in edits):
        own = (torch.arange(queries, device=q.device) + rule.mask.shift).clamp(0, rule.mask.keys - 1)
        z += folded.kept[..., None] * v[:, :, own].float().repeat_interleave(group, 1)
    z += folded.gather(rule, v.float())
    return Pass(z.to(v.dtype), lse, steps, {})


def _of_real_rows(mass: Tensor, lse: Tensor) -> Tensor:
    """Masses [batch, head, class, query], zero where the row sees no key."""
    return mass.masked_fill(torch.isinf(lse)[:, :, None], 0.0)


def _scores(q: Tensor, k: Tensor, rule: ScoreRule, span: tuple[int, int]) -> Tensor:
    """Scores of the columns `first:last`, -inf where hidden: [batch, head, query, column], some rows at a time."""
    batch, heads, queries, _ = q.shape
    step = max(blocked.BLOCK_ELEMENTS // (heads * (span[1] - span[0])), 1)
    rows = [slice(i, min(i + step, queries)) for i in range(0, queries, step)]
    every = slice(0, batch), torch.arange(heads)
    return torch.cat([rule.scores(q, k, some, slice(*span), *every).float() for some in rows], 2)


class _Recomputed(torch.autograd.Function):
    """K1 forward; the backward pass repeats attention in blocks of rows, under autograd."""

    @staticmethod
    def forward(ctx, q, k, v, rule, edits, asked, kept):
        result = _forward(q, k, v, rule, edits, *asked)
        kept.append(result)
        ctx.save_for_backward(q, k, v)
        ctx.rule, ctx.edits = rule, edits
        return result.z

    @staticmethod
    def backward(ctx, *gradients):
        with torch.enable_grad():
            q, k, v = inputs = [x.detach().requires_grad_(x.requires_grad) for x in ctx.saved_tensors]
            z = blocked.attend(q, k, v, ctx.rule, ctx.edits)[0]
            wanted = [x for x in inputs if x.requires_grad]
            found = iter(torch.autograd.grad(z, wanted, gradients[0].to(z.dtype)))
        return *(next(found) if x.requires_grad else None for x in inputs), None, None, None, None


def gather(
    q: Tensor,
    k: Tensor,
    rule: ScoreRule,
    lse: Tensor,
    steps: Sequence[WeightStep],
    x: Tensor,
    tiles: Config | None = None,
) -> Tensor:
    """`P @ x` for x [batch, head|1, key, c] → [batch, head, query, c] in float32; `lse` is infinite on silent rows."""
    folded = refold(rule, steps, lse)
    pieces = [
        rows_pass(q, k, rule, part, lse, folded, (), None, tiles, float32_mode(q))[0]
        for part in x.float().split(PIECE, -1)
    ]
    if not pieces:
        return q.new_zeros(*q.shape[:3], 0, dtype=torch.float32)
    found = torch.cat(pieces, -1)
    return found if folded is None else found + folded.gather(rule, x.float())


def statistics(
    q: Tensor,
    k: Tensor,
    rule: ScoreRule,
    lse: Tensor,
    steps: Sequence[WeightStep],
    names: Sequence[str],
    groups: Tensor | None = None,
    tiles: Config | None = None,
    window: int = 10,
) -> dict[str, Tensor]:
    """Row statistics in one K1 pass, and "received" in one K2 pass, from a finished forward pass.

    `window` is where "windowed_distance" clips, in tokens; `attend` clips at 10.
    """
    folded = refold(rule, steps, lse)
    found: dict[str, Tensor] = {}
    by_row = [name for name in names if name in ROW]
    if groups is not None:
        groups = groups[None] if groups.dim() == 2 else groups
        for rest in groups.split(MOST_GROUPS, 1)[1:] if "mass" in names else ():
            more = rows_pass(q, k, rule, None, lse, folded, ("mass",), rest, tiles)[2]["mass"]
            found["mass"] = torch.cat([found["mass"], more], 2) if "mass" in found else more
        groups = groups[:, :MOST_GROUPS]
    if by_row:
        first = rows_pass(q, k, rule, None, lse, folded, by_row, groups, tiles, window=window)[2]
        if "mass" in found:
            first["mass"] = torch.cat([first["mass"], found["mass"]], 2)
        found = _finish(first, torch.isinf(lse))
    if "received" in names:
        found["received"] = columns_pass(q, k, rule, lse, folded, None, tiles=tiles)[1]
    return {name: found[name] for name in names}


def scatter(
    q: Tensor,
    k: Tensor,
    rule: ScoreRule,
    lse: Tensor,
    steps: Sequence[WeightStep],
    y: Tensor,
    tiles: Config | None = None,
) -> Tensor:
    """`P^T @ y` for y [batch, head|1, query, c] → [batch, head, key, c] in float32."""
    folded = refold(rule, steps, lse)
    pieces = [
        columns_pass(q, k, rule, lse, folded, part, tiles=tiles)[0] for part in y.float().split(PIECE, -1)
    ]
    if not pieces:
        return q.new_zeros(*q.shape[:2], k.shape[2], 0, dtype=torch.float32)
    found = torch.cat(pieces, -1)
    return found if folded is None else found + folded.scatter(rule, y.float().expand(*q.shape[:2], -1, -1))


def received(
    q: Tensor,
    k: Tensor,
    rule: ScoreRule,
    lse: Tensor,
    steps: Sequence[WeightStep] = (),
    queries: tuple[int, int] | None = None,
    later: tuple[int, int] | None = None,
    tiles: Config | None = None,
) -> Tensor:
    """Column sums [batch, head, key], float32, of all rows, of the rows `first:last`, or of queries `later` than a key.

    `later=(near, far)` counts the queries that stand near to far positions after the key, both ends included.
    """
    return columns_pass(q, k, rule, lse, refold(rule, steps, lse), None, queries, later, tiles)[1]


def refold(rule: ScoreRule, steps: Sequence[WeightStep], lse: Tensor) -> Folded | None:
    """The edits of a finished forward pass as the kernels take them; rows without weights keep nothing."""
    if not steps:
        return None
    edits = [step.edit for step in steps]
    classes = classify(edits, rule.mask.keys, lse.device)
    return fold(edits, classes, rule, ~torch.isinf(lse), factors=[step.factors for step in steps])[0]


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
