"""Launches the Triton kernels: turns tensors, score rule and edits into the arguments of K1 and K2.

Masks, blocks and classes of keys become bits of one integer per key. No tensor here has queries × keys elements,
except a score bias, which the kernels read in place. Triton itself is imported at the first launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from headwater.kernels.backends.key_classes import Folded
from headwater.kernels.backends.score_edits import factor_and_bias
from headwater.kernels.backends.triton.tile_sizes import (
    ENOUGH_SHARED,
    INTERPRETED,
    MODEST,
    Config,
    config,
    padded,
)
from headwater.kernels.edits.scores import BlockScores, ScaleScores
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.heads import per_batch_row

# order of the planes of K1's statistics, and the flag of each
PLANES = {
    "entropy": "ENTROPY",
    "max": "TOP",
    "distance": "DISTANCE",
    "distance_squared": "SQUARED",
    "windowed_distance": "CLIPPED",
    "row_mass": "TOTAL",
    "self": "OWN",
    "previous": "BEFORE",
    "first": "EARLIEST",
}
ROW = (*PLANES, "argmax", "mass")
# statistics that take more registers than the others
HEAVY = {"mass", "distance_squared", "windowed_distance"}
MOST_GROUPS = 16
SILENT = 1e30  # the log-sum-exp of a row without weights: every exponential becomes 0


@cache
def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: settled when they are first imported."""
    from triton.runtime.jit import JITFunction

    from headwater.kernels.backends.triton.rows import rows

    return not isinstance(rows, JITFunction)


def rows_pass(
    q: Tensor, k: Tensor, rule: ScoreRule, v: Tensor | None, lse: Tensor | None, folded: Folded | None,
    names: Sequence[str], groups: Tensor | None, tiles: Config | None, values: str = "none",
    window: int = 10, skipped: int = 0, wide: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """Launch K1: from scratch, or over a given lse. Statistics come as they leave the kernel.

    `window` is where "windowed_distance" clips, in tokens. The first `skipped` keys are left out; `wide` gives z in
    float32.
    """
    from headwater.kernels.backends.triton.rows import rows

    batch, heads, queries, _ = q.shape
    args = _arguments(q, k, rule, folded)
    replay = lse is not None
    if replay:
        saved = torch.where(torch.isinf(lse), SILENT, lse).float().contiguous()
    else:
        saved = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    width, dtype = (1, q.dtype) if v is None else (v.shape[-1], v.dtype)
    dtype = torch.float32 if wide else dtype
    z = torch.empty(batch, heads, queries, width if v is not None else 0, dtype=dtype, device=q.device)
    if v is not None:
        v = (v.to(q.dtype) if values == "own" else v).expand(batch, -1, -1, -1)
        v = v if v.stride(-1) == 1 else v.contiguous()
        v_heads = v.shape[1]
        args |= {
            "V": v,
            "v_batch": v.stride(0),
            "v_head": v.stride(1) if v_heads > 1 else 0,
            "v_row": v.stride(2),
        }
        args["v_group"] = heads // v_heads
    else:
        args |= {"V": None, "v_batch": 0, "v_head": 0, "v_row": 0, "v_group": 1}

    planes = [name for name in PLANES if name in names]
    found = torch.empty(len(planes), batch, heads, queries, dtype=torch.float32, device=q.device)
    args |= {flag: planes.index(name) if name in planes else -1 for name, flag in PLANES.items()}
    place = mass = bits = first = None
    if "argmax" in names:
        place = torch.empty(batch, heads, queries, dtype=torch.int32, device=q.device)
    count = 0
    if "mass" in names:
        bits, count = _bits(groups, q.device)
        mass = torch.empty(batch, heads, count, queries, dtype=torch.float32, device=q.device)
    if "first" in names:
        first = rule.mask.first_visible(batch, 1)[:, 0].to(q.device, torch.int32).contiguous()
    args |= {
        "Z": z, "LSE": saved, "FOUND": found, "ARGMAX": place, "MASS": mass, "KEY_GROUPS": bits, "FIRST": first,
        "groups_batch": _step(bits), "first_batch": _step(first), "plane": batch * heads * queries,
        "window": float(window),
        "SINKS": None if rule.sinks is None else rule.sinks.to(q.device, torch.float32).contiguous(),
        "SUNK": rule.sinks is not None, "DV": width, "BLOCK_V": padded(width),
        "REPLAY": replay, "VALUES": values if v is not None else "none", "MIXED": float32_mode(q),
        "PLACE": "argmax" in names, "GROUPS": count, "skipped": skipped,
    }  # fmt: skip
    plain = not (args["CAPPED"] or args["BIASED"] or args["SLOPED"] or args["TEMPERED"])
    # FOLDED: the scale is left to the exponential (rows.py). Beside the search for the largest weight that would cost
    # a change of layout for every tile (Triton 3.9)
    args["FOLDED"] = plain and rule.scale > 0 and not replay and "argmax" not in names
    paired = args["BIASED"] and not args["KEYED"]
    heavy = folded is not None or not HEAVY.isdisjoint(names)
    kind = "biased" if paired else "again" if replay and v is None else "heavy" if heavy else "rows"
    chosen = tiles or _config(kind, max(q.shape[-1], width), q)
    args |= {"BLOCK_M": chosen.own, "BLOCK_N": chosen.other}
    launch(rows, -(-queries // chosen.own) * batch * heads, args, chosen, q)
    result = dict(zip(planes, found, strict=True))
    if place is not None:
        result["argmax"] = place.long()
    if mass is not None:
        result["mass"] = mass
    return z, saved, result


def columns_pass(
    q: Tensor, k: Tensor, rule: ScoreRule, lse: Tensor, folded: Folded | None, y: Tensor | None,
    queries: tuple[int, int] | None = None, later: tuple[int, int] | None = None, tiles: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch K2 for `P^T @ y`, or for the column sums where there is no y."""
    from headwater.kernels.backends.triton.columns import columns

    batch, heads = q.shape[:2]
    keys = k.shape[2]
    args = _arguments(q, k, rule, folded)
    if later is not None:
        near, far = later
        if folded is not None and not near <= 0 <= far:
            # the own position is outside of the band, and with it what an edit keeps there
            args["KEPT"] = torch.zeros_like(folded.kept)
        args["left"], args["LEFT"] = (min(args["left"], far) if args["LEFT"] else far), True
        args["right"], args["RIGHT"] = (min(args["right"], -near) if args["RIGHT"] else -near), True
    args["from_row"], args["to_row"] = queries or (0, q.shape[2])
    sums = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    width = 1
    out = None
    args |= {"Y": None, "y_batch": 0, "y_head": 0, "y_row": 0}
    if y is not None:
        y = y.expand(batch, heads, -1, -1)
        y = y if y.stride(-1) == 1 else y.contiguous()
        width = y.shape[-1]
        out = torch.empty(batch, heads, keys, width, dtype=torch.float32, device=q.device)
        args |= {"Y": y, "y_batch": y.stride(0), "y_head": y.stride(1), "y_row": y.stride(2)}
    chosen = tiles or _config("columns" if y is None else "scatter", q.shape[-1], q)
    args |= {
        "OUT": out, "RECEIVED": sums, "LSE": torch.where(torch.isinf(lse), SILENT, lse).float().contiguous(),
        "SUMS": y is None, "VALUES": "none" if y is None else float32_mode(q), "C": width,
        "BLOCK_C": padded(width), "BLOCK_N": chosen.own, "BLOCK_M": chosen.other,
    }  # fmt: skip
    launch(columns, -(-keys // chosen.own) * batch * heads, args, chosen, q)
    return (sums if out is None else out), sums


def _arguments(q: Tensor, k: Tensor, rule: ScoreRule, folded: Folded | None) -> dict[str, Any]:
    """What both kernels are given: queries, keys, the score rule and the folded edits."""
    batch, heads, queries, width = q.shape
    keys, device, mask = k.shape[2], q.device, rule.mask
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k.to(q.dtype)
    k = k if k.stride(-1) == 1 else k.contiguous()
    blocks = [edit for edit in rule.edits if isinstance(edit, BlockScores)]
    tau, bias = _temperature_and_bias(rule, q)
    key_flags = torch.zeros(1, keys, dtype=torch.int32, device=device)
    query_flags = torch.zeros(1, queries, dtype=torch.int32, device=device)
    head_flags = torch.zeros(1, heads, dtype=torch.int32, device=device)
    if mask.valid_keys is not None:
        key_flags = key_flags | (~mask.valid_keys).to(device, torch.int32)
    # key_flags: bit 0 is padding, bits 1 to 15 the blocked sets, bits 16 to 19 the class of the key. A set hides a pair
    # where key, query and head all carry its bit.
    for bit, edit in enumerate(blocks, 1):
        key_flags = key_flags | edit.keys.to(device, torch.int32) << bit
        query_flags = query_flags | edit.queries.to(device, torch.int32) << bit
        head_flags = head_flags | per_batch_row(edit.heads).to(device, torch.int32) << bit
    if folded is not None:
        key_flags = key_flags | folded.classes.of_key << 16
    bias = None if bias is None else bias.expand(batch, heads, queries, keys)
    slopes = None if rule.alibi is None else rule.alibi.to(device, torch.float32).contiguous()
    float32 = q.dtype == torch.float32
    precision = "ieee" if interpreted() else "tf32x3" if float32 else "tf32"
    return {
        "Q": q, "K": k, "BIAS": bias, "TAU": tau.contiguous(), "SLOPES": slopes, "KEY_FLAGS": key_flags.contiguous(),
        "QUERY_FLAGS": query_flags.contiguous(), "HEAD_FLAGS": head_flags.contiguous(),
        "FACTOR": None if folded is None else folded.factor, "KEPT": None if folded is None else folded.kept,
        "q_batch": q.stride(0), "q_head": q.stride(1), "q_row": q.stride(2),
        "k_batch": k.stride(0), "k_head": k.stride(1), "k_row": k.stride(2),
        "bias_batch": 0 if bias is None else bias.stride(0), "bias_head": 0 if bias is None else bias.stride(1),
        "bias_row": 0 if bias is None else bias.stride(2), "bias_column": 0 if bias is None else bias.stride(3),
        "key_flags_batch": _step(key_flags), "query_flags_batch": _step(query_flags),
        "tau_batch": _step(tau), "head_flags_batch": _step(head_flags),
        "heads": heads, "group": heads // k.shape[1], "queries": queries, "keys": keys, "shift": mask.shift,
        "left": mask.left or 0, "right": mask.right or 0, "scale": float(rule.scale),
        "cap": float(rule.softcap or 1.0), "D": width, "BLOCK_D": padded(width),
        "PRECISION": precision, "UPCAST": interpreted() and q.dtype == torch.bfloat16,
        "LEFT": mask.left is not None, "RIGHT": mask.right is not None,
        "BEHIND": mask.right is not None and mask.right <= 0, "PADDED": mask.valid_keys is not None,
        "BLOCKED": bool(blocks), "CAPPED": rule.softcap is not None, "BIASED": bias is not None,
        "KEYED": bias is not None and bias.stride(2) == 0,
        "SLOPED": slopes is not None,
        "TEMPERED": any(isinstance(edit, ScaleScores) for edit in rule.edits),
        "CLASSES": 0 if folded is None else folded.classes.count,
    }  # fmt: skip


def _temperature_and_bias(rule: ScoreRule, q: Tensor) -> tuple[Tensor, Tensor | None]:
    """The score edits as `tau * (cap(s) + bias)`: tau [batch|1, head], and the bias, which broadcasts to the scores."""
    tau = torch.ones(1, q.shape[1], dtype=torch.float32, device=q.device)
    factor, more = factor_and_bias([e for e in rule.edits if not isinstance(e, BlockScores)], tau)
    tau = tau if factor is None else factor
    bias = None if rule.bias is None else rule.bias.to(q.device)
    if more is None:
        return tau, bias
    more = (more / tau[..., None])[:, :, None]
    return tau, more if bias is None else bias + more


def launch(kernel, programs: int, args: dict[str, Any], chosen: Config, q: Tensor) -> None:
    names = set(kernel.arg_names)
    given = {name: value for name, value in args.items() if name in names}
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        # contraction to fused multiply-add is asked for: its default differs between Triton versions
        kernel[(programs,)](**given, num_warps=chosen.warps, num_stages=chosen.stages, enable_fp_fusion=True)


def _config(kernel: str, width: int, q: Tensor) -> Config:
    if interpreted():
        return INTERPRETED
    if q.device.type == "cuda":
        device = torch.cuda.get_device_properties(q.device)
        if getattr(device, "shared_memory_per_block_optin", 0) < ENOUGH_SHARED:
            return MODEST
    return config(kernel, width, 32 if q.dtype == torch.float32 else 16)


def float32_mode(q: Tensor) -> str:
    """How K1 and K2 multiply weights with float32 columns (see `product` in `shared.py`)."""
    if interpreted():
        return "ieee"
    return "tf32x3" if q.dtype == torch.float32 else "split"


def _bits(groups: Tensor | None, device: torch.device) -> tuple[Tensor, int]:
    """Groups of keys as bits, int32 [batch|1, key], and how many there are."""
    if groups is None:
        raise ValueError("the statistic 'mass' needs groups of keys")
    groups = groups[None] if groups.dim() == 2 else groups
    count = groups.shape[1]
    if count > MOST_GROUPS:
        raise ValueError(f"triton can not compute more than {MOST_GROUPS} groups of keys, got {count}")
    weights = 1 << torch.arange(count, device=device, dtype=torch.int32)
    return (groups.to(device, torch.int32) * weights[:, None]).sum(1, dtype=torch.int32).contiguous(), count


def _step(table: Tensor | None) -> int:
    """Stride between batch rows of a [batch|1, position] table."""
    return 0 if table is None or table.shape[0] == 1 else table.shape[1]
