"""How much a token matters to what is read from it: the scores of `PruneTokens` and `token_importance`.

The reader is the class token of an image tower, the last token of a language model, or, in a tower without a class
token, all tokens together. FlowCut (Tong et al. 2025, code TungChintao/FlowCut): the score of token j in a layer is

    (a_j / Σa + s_j / Σs) · ‖v_j‖₁,

with a the reader's attention, mean over heads, s the softmax over all tokens of the unscaled products of its value with
theirs, mean over heads, sums over the candidates, and v_j the mean over heads of the values. Without a reader it is
a_j · ‖v_j‖₁ with the attention that j received, as in its code for Qwen2-VL. Over layers it is carried on:
half of the sum so far and half of the new one.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.models.opened import Opened

Reader = Literal["class", "last", "all"]


def reader_of(model: Opened) -> Reader:
    """Who reads the tokens of the part: see the head of this file."""
    patches = model.parts[model.part_name].patches
    if model.causal:
        return "last"
    return "class" if patches is not None and patches.special[:1] == ("[CLS]",) else "all"


def reading_rows(reader: Reader, valid: Tensor | None, batch: int, queries: int) -> Tensor | None:
    """The row of the reader in each batch row, int64 [batch]; None for all rows."""
    if reader == "all":
        return None
    if reader == "class":
        return torch.zeros(batch, dtype=torch.long)
    if valid is None:
        return torch.full((batch,), queries - 1)
    places = torch.arange(queries)
    return torch.where(valid, places, -1).max(-1).values.expand(batch).clamp_min(0)


def attention(map: AttentionMap, rows: Tensor | None) -> Tensor:
    """The weights of the reader's row on each key, mean over heads, float32 [batch, key].

    Without a row: what each key received of the queries that see it, in the mean over these.
    """
    if rows is None:
        seen = map.visible().clamp_min(1)
        return (map.received() / seen).nan_to_num(0.0).mean(1).float().cpu()
    batch, _, _, keys = map.shape
    found = torch.zeros(batch, keys)
    for row in rows.unique().tolist():
        weights = map.tile(slice(row, row + 1), slice(0, keys))[:, :, 0].mean(1).float().cpu()
        found = torch.where((rows == row)[:, None], weights, found)
    return found.nan_to_num(0.0)


def strength(value: Tensor) -> Tensor:
    """‖v_j‖₁ of the mean over heads, float32 [batch, key], of values [batch, kv head, key, d]."""
    return value.detach().float().mean(1).abs().sum(-1).cpu()


def relation(value: Tensor, rows: Tensor, shown: Tensor | None) -> Tensor:
    """The softmax over the shown keys of v_reader · v_j, mean over heads, float32 [batch, key]."""
    v = value.detach().float().cpu()
    own = v[torch.arange(len(v)), :, rows.to(v.device)]
    scores = torch.einsum("bhd,bhkd->bhk", own, v)
    if shown is not None:
        scores = scores.masked_fill(~shown[:, None], -math.inf)
    return scores.softmax(-1).mean(1)


def flow(
    attending: Tensor, related: Tensor | None, strong: Tensor, among: Tensor, before: Tensor | None = None
) -> Tensor:
    """FlowCut's score of the tokens `among`, all [batch, key]; `before` is the one carried on from the layers below."""
    scores = attending if related is None else shares(attending, among) + shares(related, among)
    scores = scores * strong
    return scores if before is None else 0.5 * before + 0.5 * scores


def shares(values: Tensor, among: Tensor) -> Tensor:
    """Values as shares of their sum over the tokens `among`, 0 elsewhere."""
    of = values.masked_fill(~among, 0.0)
    return of / of.sum(-1, keepdim=True).clamp_min(torch.finfo(of.dtype).tiny)


def to_remove(attending: Tensor, among: Tensor, left: int, target: Tensor) -> Tensor:
    """How many of the tokens `among` FlowCut removes with `left` layers left before the target, int64 [batch].

    `(N - target)/√left · (1 - (H/log N)²)` with H the entropy of the attention on the N tokens, rounded; the largest
    number of all batch rows.
    """
    share = shares(attending, among)
    entropy = -torch.xlogy(share, share).sum(-1)
    count = among.sum(-1)
    even = count.clamp_min(2).double().log()
    cut = (count - target) / math.sqrt(left) * (1 - (entropy.double() / even) ** 2)
    return cut.max().round().long().expand(len(count)).clamp_min(0)


def patch_entropy(pixels: Tensor, size: tuple[int, int], levels: int = 256) -> Tensor:
    """Entropy in bits of the grey levels in each patch, float32 [picture, patch], of pixels [picture, channel, y, x].

    The grey picture (mean over channels) is cut into `levels` levels from its least to its largest value.
    """
    grey = pixels.detach().float().cpu().mean(1)
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    level = ((grey - low) / (high - low).clamp_min(1e-12) * (levels - 1)).round().long()
    high_of, wide_of = size
    cut = level.unfold(1, high_of, high_of).unfold(2, wide_of, wide_of).flatten(3).flatten(1, 2)
    counts = torch.zeros(*cut.shape[:2], levels).scatter_add_(2, cut, torch.ones(cut.shape))
    share = counts / cut.shape[-1]
    return -(torch.xlogy(share, share).sum(-1) / math.log(2))
