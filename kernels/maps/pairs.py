"""Exact weights on chosen (query, key) pairs: stripes at a fixed offset, induction pairs, any few columns per row.

A pair needs its own score and the row's saved log-sum-exp, `exp(s_ij - lse_i)`, so n columns of every row cost O(S·n·D)
and no pass over the map. Score rules, key edits and edits of key sets are computed pair by pair; a map with an edit
that is defined by whole tiles costs one pass over blocks of rows instead. Memory is the result and one block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headwater.kernels.backends import blocked
from headwater.kernels.edits import (
    BiasKeys,
    BlockScores,
    EmphasiseScores,
    MaskScores,
    MixIdentity,
    Rescale,
    ScaleScores,
    ScoreEdit,
)
from headwater.kernels.rules.rule import ScoreRule

if TYPE_CHECKING:
    from headwater.kernels.maps.attention_map import AttentionMap

GATHERED = 2**22  # numbers of k that are gathered at a time: 16 MB of float32


def stripe(map: AttentionMap, offset: int) -> Tensor:
    """Weight of each query on the key `offset` positions before it, float32 [batch, head, query]; negative: after it.

    0 is the own position, 1 the previous one. 0 weight where there is no such key, where it is hidden and on rows of
    padding.
    """
    mask = map.rule.mask
    column = torch.arange(mask.queries) + mask.shift - offset
    return at(map, column[:, None])[..., 0]


def at(map: AttentionMap, columns: Tensor) -> Tensor:
    """Weights at `columns`, float32 [batch, head, query, n] on the map's device.

    `columns` is int64 [query, n], [batch, query, n] or [batch, head, query, n]. 0 where a column is outside of the keys
    (-1 says "none"), where it is hidden and on rows of padding.
    """
    columns = _four(map, columns)
    if _pair_by_pair(map):
        return _direct(map, columns)
    return _from_blocks(map, columns)


def after_previous(ids: Tensor, valid: Tensor | None = None) -> Tensor:
    """The column after the last earlier occurrence of the token at each position: where an induction head looks.

    `ids` int64 and `valid` bool are [batch, position]; int64 [batch, position], -1 where the token is new or padding.
    `map.at(after_previous(ids)[..., None])` is the induction stripe. O(S log S), no pairs of positions.
    """
    length = ids.shape[1]
    order = ids.argsort(dim=1, stable=True)
    if valid is not None:
        # padding is no occurrence of anything: it is sorted behind all tokens
        order = order.gather(1, (~valid).gather(1, order).int().argsort(dim=1, stable=True))
    sorted_ids = ids.gather(1, order)
    same = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    if valid is not None:
        same = same & valid.gather(1, order)[:, 1:]
    following = torch.where(same, order[:, :-1] + 1, -1)
    found = torch.full_like(order, -1).scatter(1, order[:, 1:], following)
    if valid is not None and length:
        real = valid.gather(1, found.clamp_min(0))
        found = torch.where(real, found, -1)
    return found


def _four(map: AttentionMap, columns: Tensor) -> Tensor:
    """`columns` as int64 [batch, head|1, query, n] on the map's device."""
    batch, heads, queries, _ = map.shape
    given = tuple(columns.shape)
    if columns.dim() == 2:
        columns = columns[None, None]
    elif columns.dim() == 3:
        columns = columns[:, None]
    fits = columns.dim() == 4 and columns.shape[2] == queries
    if not fits or columns.shape[0] not in (1, batch) or columns.shape[1] not in (1, heads):
        raise ValueError(
            f"columns must be [query, n], [batch, query, n] or [batch, head, query, n] with batch={batch}, "
            f"head={heads}, query={queries}; got {given}"
        )
    return columns.to(map.q.device, torch.long).expand(batch, -1, -1, -1)


def _pair_by_pair(map: AttentionMap) -> bool:
    whole = any(isinstance(edit, MaskScores) for edit in map.rule.edits)
    return not whole and all(isinstance(step.edit, Rescale | MixIdentity) for step in map.steps)


def _direct(map: AttentionMap, columns: Tensor) -> Tensor:
    batch, heads, queries, keys = map.shape
    n, width = columns.shape[-1], map.q.shape[-1]
    found = torch.zeros(batch, heads, queries, n, device=map.q.device)
    if not found.numel() or not keys:
        return found
    taller = heads if columns.shape[1] > 1 else map.k.shape[1]
    step = max(GATHERED // (taller * n * width), 1)
    for b in range(batch):
        for begin in range(0, queries, step):
            rows = slice(begin, min(begin + step, queries))
            found[b, :, rows] = _weights(map, b, rows, columns[b, :, rows]).float()
    return found


def _weights(map: AttentionMap, b: int, rows: slice, columns: Tensor) -> Tensor:
    """Weights of one batch row at `columns` [head|1, row, n] → [head, row, n]."""
    mask, heads = map.rule.mask, map.shape[1]
    device = map.q.device
    inside = (columns >= 0) & (columns < mask.keys)
    place = columns.clamp(0, mask.keys - 1)
    scores = _scores(map, b, rows, place)
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    seen = inside
    if mask.right is not None:
        seen = seen & (place - row - mask.shift <= mask.right)
    if mask.left is not None:
        seen = seen & (row + mask.shift - place <= mask.left)
    if mask.valid_keys is not None:
        seen = seen & _of(mask.valid_keys, b).to(device)[place]
    if mask.extra is not None:
        head = torch.arange(heads, device=device)[None, :, None, None]
        index = torch.full((1, 1, 1, 1), b, device=device)
        query = (row + mask.query_offset)[None, None]
        seen = seen & mask.extra(index, head, query, (place + mask.key_offset)[None])[0]
    if mask.documents is not None:
        documents = _of(mask.documents, b).to(device)
        seen = seen & (documents[row + mask.query_offset] == documents[place + mask.key_offset])
    lse = map.lse[b, :, rows].to(scores)[..., None]
    scores = scores.masked_fill(~seen, float("-inf"))
    kind = map.rule.normaliser
    weights = (scores - lse).clamp(max=0).exp() if kind is None else kind.weights(scores, lse)
    for step in map.steps:
        factors = [f[b, :, rows].to(weights)[..., None] for f in step.factors]
        if isinstance(step.edit, Rescale):
            on_keys, on_to = (_of(x, b).to(device)[place].to(weights) for x in (step.edit.keys, step.edit.to))
            weights = weights * (1 + on_keys * (factors[0] - 1) + on_to * (factors[1] - 1))
        else:
            diagonal = (place == row + mask.shift).to(weights)
            weights = weights * (1 - factors[0]) + factors[0] * diagonal
    # a row of padding has factors, but takes part in nothing
    return torch.where(inside & ~torch.isposinf(lse), weights, 0.0)


def _scores(map: AttentionMap, b: int, rows: slice, place: Tensor) -> Tensor:
    """Scores of the pairs before the mask, [head, row, n] in float32 (float64 for float64 queries)."""
    rule: ScoreRule = map.rule
    heads, kv_heads = map.q.shape[1], map.k.shape[1]
    high = torch.float64 if map.q.dtype == torch.float64 else torch.float32
    q = map.q[b, :, rows].to(high) * rule.scale
    if len(place) == 1:
        k = map.k[b][:, place[0]].to(high)
        scores = torch.einsum("hgrd,hrnd->hgrn", q.unflatten(0, (kv_heads, -1)), k).flatten(0, 1)
    else:
        kv_head = torch.arange(heads, device=place.device) // (heads // kv_heads)
        k = map.k[b][kv_head[:, None, None], place].to(high)
        scores = torch.einsum("hrd,hrnd->hrn", q, k)
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    every = place.expand(heads, -1, -1)
    if rule.bias is not None:
        bias = rule.bias.to(map.q.device).expand(map.shape)[b, :, rows]
        scores = scores + bias.gather(-1, every).to(scores)
    if rule.alibi is not None:
        row = torch.arange(rows.start, rows.stop, device=place.device)[:, None] + rule.mask.shift
        scores = scores - rule.alibi.to(scores)[:, None, None] * (row - every).abs()
    for edit in rule.edits:
        scores = _edited(scores, edit, b, rows, every)
    return scores


def _edited(scores: Tensor, edit: ScoreEdit, b: int, rows: slice, place: Tensor) -> Tensor:
    """One score edit on the pairs of one batch row, as kernels/edits/scores.py has it on tiles."""
    heads = edit.heads if edit.heads.dim() == 1 else _of(edit.heads, b)
    chosen = heads.to(scores.device)[:, None, None]
    hidden = scores == float("-inf")
    size = scores.masked_fill(hidden, 0.0)
    if isinstance(edit, ScaleScores):
        return torch.where(chosen & ~hidden, edit.tau * size, scores)
    if isinstance(edit, BiasKeys):
        bias = _of(edit.bias, b).to(scores.device).expand(len(scores), -1)
        bias = bias[:, None].expand(-1, place.shape[1], -1).gather(-1, place)
        return scores + torch.where(chosen, bias.to(scores), 0.0)
    assert isinstance(edit, BlockScores | EmphasiseScores)
    queries, keys = (_of(x, b).to(scores.device) for x in (edit.queries, edit.keys))
    pairs = chosen & queries[rows, None] & keys[place]
    if isinstance(edit, BlockScores):
        return scores.masked_fill(pairs, float("-inf"))
    return scores + torch.where(pairs, edit.amount * size.abs(), 0.0)


def _of(given: Tensor, b: int) -> Tensor:
    return given[0] if len(given) == 1 else given[b]


def _from_blocks(map: AttentionMap, columns: Tensor) -> Tensor:
    batch, heads, queries, _ = map.shape
    found = torch.zeros(batch, heads, queries, columns.shape[-1], device=map.q.device)
    for block in blocked.blocks(batch, range(heads), map.rule):
        weights = map.block(block)
        if not weights.shape[-1]:
            continue
        place = columns[block.batch]
        place = (place if place.shape[1] == 1 else place[:, block.heads])[:, :, block.rows]
        place = (place - block.columns.start).expand(*weights.shape[:3], -1)
        inside = (place >= 0) & (place < weights.shape[-1])
        picked = weights.gather(-1, place.clamp(0, weights.shape[-1] - 1))
        found[block.batch, block.heads, block.rows] = torch.where(inside, picked, 0.0).float()
    return found
