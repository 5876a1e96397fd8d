"""Attention through torch's fused CPU kernel, which also gives the row log-sum-exp: fast, linear memory, plain softmax.

It takes causal masks (in two calls where queries start inside a cache) and bidirectional masks, key padding, an
additive bias, grouped queries and learned sinks (a factor on the output). kernels/backends/flash.py adds the edits.
`why_not` names what it refuses. `P^T @ Y` is attention again: queries and keys change places, one more feature carries
-lse, and both sequences are reversed so that causal stays causal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.kernels.rules.rule import ScoreRule, with_sink
from headwater.kernels.tiles.block import tile_dtype
from headwater.kernels.tiles.heads import per_query_head
from headwater.kernels.tiles.mask import Mask
from headwater.kernels.tiles.shapes import AtKeys, AtQueries, Keys, Output, PerQuery, Queries, Values

# (output, lse [batch, head, query] in natural log); lse is 0 on a row without keys, which callers mend
_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ROWS_BY_KEYS = 2**20  # scores that are looked at together, of rows that may have overflowed


def why_not(q: Tensor, k: Tensor, rule: ScoreRule, transposed: bool = False) -> str | None:
    """What of this combination can not be computed here, or None where it can."""
    mask = rule.mask
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if q.device.type != "cpu":
        return f"the fused kernel used here is for the CPU, the tensors are on {q.device.type}"
    if rule.scale <= 0:
        return "scores with a scale of 0 or below, as it hides pairs before it scales them"
    if rule.softcap is not None:
        return "soft-capped scores"
    if rule.normaliser is not None:
        return f"{rule.normaliser.name} weights"
    if rule.alibi is not None:
        return "ALiBi"
    if rule.edits:
        return "edited scores"
    if rule.sinks is not None and (learns or (torch.is_grad_enabled() and rule.sinks.requires_grad)):
        return "gradients through learned sinks, as its log-sum-exp carries none"
    if torch.is_grad_enabled() and rule.bias is not None and rule.bias.requires_grad:
        return "gradients of a score bias"
    if mask.beyond_band:
        return mask.beyond_band
    if mask.queries == 0 or mask.keys == 0:
        return "an empty cache"
    first, last = rule.mask.span
    causal = _is_causal(rule, first, last)
    if causal is None:
        if not _seen_by_all(rule):
            return "a sliding window"
        if learns:
            return "gradients where queries start inside the cache, as its log-sum-exp carries none"
        causal, first = True, first + _seen_by_all(rule)
    if first == last:
        return "a band that hides every key"
    if transposed:
        if learns:
            return "gradients of the transpose, as its log-sum-exp carries none"
        if rule.bias is not None:
            return "the transpose under an additive bias"
        if causal and last - first != mask.queries:
            return "the transpose of a causal map that is not square"
    return None


def one_call(rule: ScoreRule) -> bool | None:
    """Whether the one call that is all of attention under a rule is causal; None where there is more to do."""
    mask = rule.mask
    first, last = mask.span
    if rule.bias is not None or rule.sinks is not None or mask.valid_keys is not None:
        return None
    if (first, last) != (0, mask.keys) or not _every_row_sees(mask):
        return None
    return _is_causal(rule, first, last)


def windowed(rule: ScoreRule) -> bool:
    """Whether the band of a rule hides keys that no call of the kernel can hide."""
    return _is_causal(rule, *rule.mask.span) is None and not _seen_by_all(rule)


def _is_causal(rule: ScoreRule, first: int, last: int) -> bool | None:
    """Is the band over the columns `first:last` the kernel's causal mask (True), or all-visible (False), or neither?"""
    mask = rule.mask
    shift = mask.shift - first
    if mask.left is not None and mask.queries - 1 + shift > mask.left:
        return None
    if mask.right is None or shift + mask.right >= last - first - 1:
        return False
    return True if shift + mask.right == 0 else None


def _seen_by_all(rule: ScoreRule) -> int:
    """Keys before the first query, which a causal mask shows to all; 0 where there are none, or a window hides some."""
    mask = rule.mask
    if mask.right is None or (mask.left is not None and mask.queries - 1 + mask.shift > mask.left):
        return 0
    return max(mask.shift + mask.right, 0)


def _halves(rule: ScoreRule) -> tuple[tuple[slice, ScoreRule], ...]:
    """The cache, which every query sees, and what follows it, which is plainly causal: columns and rule of each."""
    keys, cached = rule.mask.keys, _seen_by_all(rule)
    found = []
    for columns, right in ((slice(0, cached), None), (slice(cached, keys), rule.mask.right)):
        mask = replace(rule.mask.trimmed(columns.start, columns.stop), left=None, right=right)
        bias = rule.bias
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., columns]
        found.append((columns, replace(rule, mask=mask, bias=bias, sinks=None)))
    return tuple(found)


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


def call(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The kernel wants equal widths for q, k and v, and under autograd as many key heads as query heads.

    It takes the features of a position to be neighbours in memory and does not look.
    """
    width, wanted = q.shape[-1], v.shape[-1]
    if wanted < width:
        v = torch.nn.functional.pad(v, (0, width - wanted))
    elif wanted > width:
        q, k = (torch.nn.functional.pad(x, (0, wanted - width)) for x in (q, k))
    if torch.is_grad_enabled() and k.shape[1] != q.shape[1]:
        k, v = (per_query_head(x, q.shape[1]) for x in (k, v))
    if bias is not None and bias.shape[2] == 1 and bias.shape[1] == 1:
        bias = bias.expand(q.shape[0], 1, 1, -1)
    q, k, v = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    out, lse = _fused(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if not lse.all() and (lost := _overflowed(q, k, lse, causal, bias, scale)).any():
        out, lse = out.masked_fill(lost[..., None], torch.nan), lse.masked_fill(lost, torch.nan)
    return (out if wanted >= width else out[..., :wanted]), lse


@torch.no_grad()
def _overflowed(q: Tensor, k: Tensor, lse: Tensor, causal: bool, bias: Tensor | None, scale: float) -> Tensor:
    """Rows whose scores are all NaN or below every number, bool [batch, head, query].

    Where they have few keys the kernel takes them for rows without keys: their output and log-sum-exp are 0.
    """
    group, columns = q.shape[1] // k.shape[1], torch.arange(k.shape[2])
    q, k = q.to(lse.dtype), k.to(lse.dtype)
    reach = q.abs().sum(-1) * k.abs().amax((2, 3)).repeat_interleave(group, 1)[..., None]
    lost = (lse == 0) & ~reach.isfinite()
    for b, h in lost.any(-1).nonzero().tolist():
        for rows in lost[b, h].nonzero()[:, 0].split(max(ROWS_BY_KEYS // k.shape[2], 1)):
            scores = q[b, h, rows] @ k[b, h // group].mT * scale
            seen = columns <= rows[:, None] if causal else torch.ones_like(scores, dtype=torch.bool)
            if bias is not None:
                added = bias.expand(*q.shape[:3], -1)[b, h, rows]
                scores, seen = scores + added, seen & (added > -torch.inf)
            lost[b, h, rows] = seen.any(-1) & ~((scores > -torch.inf) & seen).any(-1)
    return lost


def attend(q: Queries, k: Keys, v: Values, rule: ScoreRule) -> tuple[Output, PerQuery]:
    """Output z and lse; zero and -inf on a row without keys."""
    first, last = rule.mask.span
    causal = _is_causal(rule, first, last)
    if causal is None:
        z, lse = _joined([attend(q, k[:, :, part], v[:, :, part], half) for part, half in _halves(rule)])
    else:
        if last - first < k.shape[2]:
            k, v = k[:, :, first:last], v[:, :, first:last]
        bias = _additive(rule, first, last, q)
        z, lse = call(q, k, v.to(q.dtype), causal, bias, rule.scale)
        if bias is not None or not _every_row_sees(rule.mask):
            empty = _empty(rule, bias, first, last).to(q.device)
            if empty.any():
                lse = lse.masked_fill(empty, float("-inf"))
                z = z.masked_fill(empty[..., None], 0.0)
    if rule.sinks is not None:
        merged = with_sink(lse, rule.sink_logits)
        share = torch.exp(lse - torch.where(merged == float("-inf"), 0.0, merged))
        z, lse = z * share[..., None].to(z), merged
    return z, lse


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over disjoint keys as attention over all of them: each part by the mass of its own log-sum-exp."""
    # Z = sum_c Z_c over the disjoint parts, and z = sum_c (Z_c / Z) z_c with Z_c / Z = exp(lse_c - lse)
    lse = torch.stack([part for _, part in parts]).logsumexp(0)
    row = torch.where(lse == float("-inf"), math.inf, lse)
    return sum(torch.exp(part - row)[..., None].to(z) * z for z, part in parts), lse  # pyright: ignore[reportReturnType]


def _every_row_sees(mask: Mask) -> bool:
    """Whether the band shows every row a key, from its numbers alone."""
    first = mask.right is None or mask.shift + mask.right >= 0
    last = mask.left is None or mask.queries - 1 + mask.shift - mask.left < mask.keys
    return first and last and (mask.left or 0) + (mask.right or 0) >= 0


def _empty(rule: ScoreRule, bias: Tensor | None, first: int, last: int) -> Tensor:
    """Rows from which band, padding or a bias of -inf hide every key, bool [batch|1, head|1, query]."""
    low, high = (bound.clamp(first, last) - first for bound in (rule.mask.lower(), rule.mask.upper()))
    if bias is None:
        return (low >= high)[None, None]
    if bias.shape[-1] == 1:
        return (low >= high)[None, None] | (bias[..., 0] == float("-inf")).cpu()
    if bias.shape[2] == 1:
        seen = torch.nn.functional.pad((bias[:, :, 0] > float("-inf")).cpu().long().cumsum(-1), (1, 0))
        return seen[..., high] <= seen[..., low]
    columns, found = torch.arange(last - first), []
    for part in torch.arange(rule.mask.queries).split(256):
        band = (columns >= low[part, None]) & (columns < high[part, None])
        found.append(((bias[:, :, part] > float("-inf")).cpu() & band).any(-1))
    return ~torch.cat(found, -1)


def scatter(
    q: Queries, k: Keys, rule: ScoreRule, lse: PerQuery, y: AtQueries,
    key_bias: Float[Tensor, "#batch #head key"] | None = None,
) -> AtKeys:  # fmt: skip
    """`P^T @ y`; rows whose lse is +inf give nothing.

    `key_bias` is added to the scores of a key, and may hide it (-inf).
    Column j of P is `exp(scale*k_j·q_i - lse_i)` over i: a softmax over the queries, times the exponential of its own
    log-sum-exp. A learned sink is inside `lse` already.
    """
    batch, heads, _, width = q.shape
    first, last = rule.mask.span
    causal = _is_causal(rule, first, last)
    if causal is None:
        found = []
        for part, half in _halves(rule):
            own_bias = None if key_bias is None else key_bias[..., part]
            found.append(scatter(q, k[:, :, part], half, lse, y, own_bias))
        return torch.cat(found, 2)
    # The transposed product as attention. With keys as queries, [k_j, 1], and queries as keys, [q_i, -lse_i / scale],
    # the scores are  scale * q_i·k_j - lse_i = ln p_ij,  [batch, head, key, query]. The kernel normalises them over i:
    # it gives  sum_i p_ij y_i / m_j  and  ln m_j  with m_j = sum_i p_ij, so the product is its output times m_j.
    # Reversing both sequences turns "row i sees the keys j <= i" into "j sees the rows i >= j", which reads as
    # a causal mask again. The kernel wants values as wide as its d_head + 1, hence pieces of y.
    high = tile_dtype(q)
    keys = per_query_head(k[:, :, first:last].to(high), heads)
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
        mean, log_mass = call(new_q, new_k, piece, causal, bias, rule.scale)
        seen = _seen(rule, silent, first, last)
        logs = log_mass.flip(2) if key_bias is None else log_mass.flip(2) + key_bias[..., first:last]
        scale = torch.exp(torch.where(seen, logs, -math.inf))
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
