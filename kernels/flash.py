"""Attention through torch's fused CPU kernel, which also gives the row log-sum-exp: fast, linear memory, plain softmax.

It takes causal and bidirectional masks, key padding, additive bias, grouped queries and learned sinks (a factor on the
output); the reason why it refuses anything else is given by `refuses`. `P^T @ Y` is attention again: queries and keys
change places, one more feature carries -lse, and both sequences are reversed so that causal stays causal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headwater.kernels.rule import ScoreRule

# (output, lse [batch, head, query] in natural log); lse is 0 on a row without keys, which callers mend
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def refuses(rule: ScoreRule, q: Tensor, transposed: bool = False) -> str | None:
    """Why this combination can not be computed here, or None where it can."""
    mask = rule.mask
    if q.device.type != "cpu":
        return f"the fused kernel used here is for the CPU, the tensors are on {q.device.type}"
    if rule.softcap is not None:
        return "soft-capped scores"
    if rule.edits:
        return "edited scores"
    if rule.sinks is not None and q.requires_grad and torch.is_grad_enabled():
        return "gradients through learned sinks, as its log-sum-exp carries none"
    if not mask.is_band:
        return "a mask given as a function"
    if mask.queries == 0 or mask.keys == 0:
        return "an empty cache"
    first, last = _span(rule)
    causal = _is_causal(rule, first, last)
    if causal is None:
        return "a sliding window, or a causal mask whose queries start inside the cache"
    if transposed:
        if rule.bias is not None:
            return "the transpose under an additive bias"
        if causal and last - first != mask.queries:
            return "the transpose of a causal map that is not square"
    return None


def _span(rule: ScoreRule) -> tuple[int, int]:
    return rule.mask.key_span(0, rule.mask.queries)


def _is_causal(rule: ScoreRule, first: int, last: int) -> bool | None:
    """Is the band over the columns `first:last` the kernel's causal mask (True), or all-visible (False), or neither?"""
    mask = rule.mask
    shift = mask.shift - first
    if mask.left is not None and mask.queries - 1 + shift > mask.left:
        return None
    if mask.right is None or shift + mask.right >= last - first - 1:
        return False
    return True if shift + mask.right == 0 else None


def _additive(rule: ScoreRule, first: int, last: int, like: Tensor) -> Tensor | None:
    """Bias and key padding as one float mask [batch|1, head|1, query|1, key]; None where there is neither."""
    bias = None
    if rule.bias is not None:
        bias = rule.bias.to(like)
        bias = bias if bias.shape[-1] == 1 else bias[..., first:last]
    if rule.mask.valid_keys is not None:
        hidden = ~rule.mask.valid_keys[:, None, None, first:last]
        bias = torch.zeros_like(hidden, dtype=like.dtype) if bias is None else bias
        bias = bias.masked_fill(hidden.to(like.device), float("-inf"))
    return bias


def _call(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The kernel wants equal widths for q, k and v, and under autograd as many key heads as query heads."""
    width, wanted = q.shape[-1], v.shape[-1]
    if wanted < width:
        v = torch.nn.functional.pad(v, (0, width - wanted))
    elif wanted > width:
        q, k = (torch.nn.functional.pad(x, (0, wanted - width)) for x in (q, k))
    if torch.is_grad_enabled() and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    if bias is not None and bias.shape[2] == 1 and bias.shape[1] == 1:
        bias = bias.expand(q.shape[0], 1, 1, -1)
    out, lse = _fused(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    return out[..., :wanted], lse


def attend(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule) -> tuple[Tensor, Tensor]:
    """Output z [batch, head, query, d_value] and lse [batch, head, query]; zero and -inf on a row without keys."""
    if reason := refuses(rule, q):
        raise ValueError(f"flash can not compute {reason}; use backend='blocked'")
    first, last = _span(rule)
    causal = bool(_is_causal(rule, first, last))
    k, v = k[:, :, first:last], v[:, :, first:last]
    z, lse = _call(q, k, v.to(q.dtype), causal, _additive(rule, first, last, q), rule.scale)
    if rule.mask.valid_keys is not None or rule.mask.right is not None:
        empty = (rule.mask.visible_keys(len(q), 1) == 0).to(q.device)
        if empty.any():
            lse = lse.masked_fill(empty, float("-inf"))
            z = z.masked_fill(empty[..., None], 0.0)
    if rule.sinks is not None:
        merged = torch.logaddexp(lse, rule.sinks.to(lse)[None, :, None].expand_as(lse))
        merged = torch.where(lse == float("-inf"), lse, merged)
        share = torch.exp(lse - torch.where(merged == float("-inf"), 0.0, merged))
        z, lse = z * share[..., None].to(z), merged
    return z, lse


def gather(q: Tensor, k: Tensor, rule: ScoreRule, x: Tensor) -> Tensor:
    """`P @ x` for x [batch, head|1, key, c]: attention with x in the place of the values, in float32 or float64."""
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    if x.shape[1] == 1:
        x = x.expand(-1, k.shape[1], -1, -1)
    elif x.shape[1] != k.shape[1]:
        k = k.repeat_interleave(x.shape[1] // k.shape[1], 1)
    return attend(q.to(high), k.to(high), x.to(high), rule)[0]


def scatter(q: Tensor, k: Tensor, rule: ScoreRule, lse: Tensor, y: Tensor) -> Tensor:
    """`P^T @ y` for y [batch, head, query, c] → [batch, head, key, c]; rows whose lse is +inf give nothing.

    Column j of P is `exp(scale*k_j·q_i - lse_i)` over i: a softmax over the queries, times the exponential of its own
    log-sum-exp. A learned sink is inside `lse` already.
    """
    if reason := refuses(rule, q, transposed=True):
        raise ValueError(f"flash can not compute {reason}; use backend='blocked'")
    batch, heads, _, width = q.shape
    first, last = _span(rule)
    causal = bool(_is_causal(rule, first, last))
    high = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k[:, :, first:last].to(high).repeat_interleave(heads // k.shape[1], 1)
    silent = torch.isinf(lse)
    feature = torch.where(silent, 0.0, -lse / rule.scale).to(high)[..., None]
    new_q = torch.cat([keys, torch.ones_like(keys[..., :1])], -1).flip(2)
    new_k = torch.cat([q.to(high), feature], -1).flip(2)
    bias = None
    if silent.any():
        bias = torch.zeros_like(lse, dtype=high).masked_fill(silent, float("-inf"))[:, :, None].flip(-1)
    out = q.new_zeros(batch, heads, rule.mask.keys, y.shape[-1], dtype=high)
    for begin in range(0, y.shape[-1], width + 1):
        piece = y[..., begin : begin + width + 1].to(high).flip(2)
        mean, log_mass = _call(new_q, new_k, piece, causal, bias, rule.scale)
        seen = _seen(rule, silent, first, last)
        scale = torch.exp(torch.where(seen, log_mass.flip(2), -math.inf))
        out[:, :, first:last, begin : begin + width + 1] = mean.flip(2) * scale[..., None]
    return out


def _seen(rule: ScoreRule, silent: Tensor, first: int, last: int) -> Tensor:
    """Keys that are real and seen by some row that has weights, bool [batch, head, key]."""
    columns = torch.arange(first, last, device=silent.device)
    some = (~silent).any(-1, keepdim=True).expand(*silent.shape[:2], last - first)
    if rule.mask.right is not None:
        # under a causal mask key j is seen by the rows from j on, so the last row with weights decides
        rows = torch.arange(silent.shape[-1], device=silent.device)
        latest = torch.where(silent, -1, rows).amax(-1, keepdim=True)
        some = some & (columns <= latest + rule.mask.shift + rule.mask.right)
    if rule.mask.valid_keys is not None:
        some = some & rule.mask.valid_keys[:, None, first:last].to(silent.device)
    return some
