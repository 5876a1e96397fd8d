"""Contrastive covariance of queries and keys: in which directions a head compares one feature.

The mean of `q kᵀ` over pairs that share a feature, less its mean over pairs that do not, keeps what the feature
changes (arXiv:2602.04752). Its singular vectors are the directions in which query and key are compared. Pairs are read
in blocks of rows, so memory is linear in the length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds, Seed
from headwater.analyses._prompts.positions import Positions
from headwater.analyses._streams.query_turns import at_start, query_turns
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.tiles.block import Block
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head, chosen_layers
from headwater.lens.records.record import Record

Feature = Literal["token", "previous"]
PARTS = ("subspace", "query", "key", "rest")  # which of the two sides lie in the subspace
PAIRS = 2**20  # pairs of one block


@analysis
def contrastive_qk(
    record: Record,
    feature: Annotated[Feature, "the key is, or stands behind, the query's own token"] = "token",
    labels: Annotated[Tensor | None, "the feature at each query [batch, query]; below 0: none"] = None,
    key_labels: Annotated[
        Tensor | None, "the feature at each key [batch, key]; none: that of the queries"
    ] = None,
    layers: Annotated[Positions, 'layers to read, or "all"'] = "all",
    rank: Annotated[int | None, "directions of the subspace; none: by share", Bounds(1)] = None,
    share: Annotated[
        float, "of the squared singular values that the subspace holds", Bounds(0.0, 1.0)
    ] = 0.99,
    seed: Seed = 0,
    unrotated_by: Annotated[
        HookedModel | None, "model whose rotation by position is taken back; none: as recorded"
    ] = None,
) -> xr.Dataset:
    """`ΔC = mean_i q_i (k̄_i⁺ - k̄_i⁻)ᵀ = U S Vᵀ` of each head; k̄_i⁺ is the mean key that shares the feature of query i.

    k̄_i⁻ is the mean of the other keys that i sees. Only queries that see both kinds count (`queries` [layer, head]),
    each as much as any other, so that both means are over the same queries. A position and itself are no pair. "token":
    key and query are the same token; "previous": the token before the key is the query's (induction). `labels` replace
    both. Queries and keys are the recorded ones, behind norms and with their rotation by position. With `unrotated_by`,
    the model of a record, both are turned back to position 0: what is left does not depend on where they stand, and
    `score` is that of a query and a key at one position.

    Dataset: `singular` [layer, head, component] falls; `rank` [layer, head] is the fewest whose squares hold `share` of
    their sum. `query_directions` and `key_directions` [layer, head, component, channel] are the rows of Uᵀ and Vᵀ.
    `shuffled` [layer, head] is the largest singular value when each text's key labels are permuted, and `above_chance`
    counts the singular values above it. `score` [layer, head, match, part] is the mean of `scale · q·k` over the pairs
    that match and over the others, split by the first `rank` directions: "subspace" (both sides inside), "query" (the
    query's side alone), "key", "rest"; parts sum to the score. Soft caps, biases and ALiBi come later and are not in
    it. Layers without such queries are NaN, of rank 0. AnalysisError where no layer has one.

    Question: In which directions does each head compare a feature of query and key?
    Unit: squared units of q and k; score (scaled, before a soft cap, biases of position and softmax).
    Source: arXiv:2602.04752 (covariance and subspaces); equal weight of queries and the shuffled labels are ours.
    Cost: 4·layers·heads·S²·d_head multiplications; memory linear in S, and 2·d_head² numbers per head.
    Not for: causes; a feature that goes along with another one; features at fixed distances in a rotary model, where
    rotation mixes in unless unrotated_by takes it back.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("Mary and John went to the store , Mary and John went to the store")
    >>> found = hw.analyses.contrastive_qk(record, "previous")
    >>> found.singular.shape, found.score.sum("part").dims
    ((4, 8, 32), ('layer', 'head', 'match'))
    """
    chosen = chosen_layers(layers, record.layers)
    queries, keys = _labels(record, feature, labels, key_labels)
    mixed = _shuffled(keys, seed)
    columns: dict[str, list[Tensor]] = {}
    turns = _turns(record, unrotated_by)
    for layer in chosen:
        map = _unrotated(record, record.map(layer), turns.get(layer))
        means, count = _covariances(map, queries, keys, record.keys is not None)
        left, singular, right = torch.linalg.svd(means[0] - means[1])
        again, _ = _covariances(map, queries, mixed, record.keys is not None)
        chance = torch.linalg.matrix_norm(again[0] - again[1], 2)
        held = singular.square().cumsum(-1)
        size = (held < share * held[:, -1:] * (1 - 1e-12)).sum(-1) + 1
        size = size if rank is None else torch.full_like(size, rank).clamp(max=held.shape[-1])
        size[count == 0] = 0
        parts = [
            [
                _split(mean, u[:, :n], v[:n], map.rule.scale)
                for u, v, mean, n in zip(left, right, of, size, strict=True)
            ]
            for of in means
        ]
        found = {
            "singular": singular, "rank": size, "query_directions": left.mT, "key_directions": right, "queries": count,
            "shuffled": chance, "above_chance": (singular > chance[:, None]).sum(-1),
            "score": torch.stack([torch.stack(each) for each in parts], 1),
        }  # fmt: skip
        for name, values in found.items():
            blank = values.is_floating_point() and bool((count == 0).any())
            empty = (count == 0).view(-1, *[1] * (values.dim() - 1))
            columns.setdefault(name, []).append(values.masked_fill(empty, torch.nan) if blank else values)
    if not any(count.any() for count in columns["queries"]):
        raise AnalysisError(
            "no query sees both a key that shares its feature and one that does not; give longer texts with repeated "
            "tokens, or labels= with the feature at each position"
        )
    dims = {
        "singular": ("component",), "query_directions": ("component", "channel"), "score": ("match", "part"),
        "key_directions": ("component", "channel"),
    }  # fmt: skip
    return xr.Dataset(
        {n: (("layer", "head", *dims.get(n, ())), _stacked(each).numpy()) for n, each in columns.items()},
        coords={
            "layer": chosen, "head": np.arange(record.n_heads), "match": [True, False], "part": list(PARTS),
        },
        attrs={"rotated": unrotated_by is None},
    )  # fmt: skip


def score_parts(
    record: Record, found: xr.Dataset, head: str | Head, query: int, batch: int = 0,
    unrotated_by: HookedModel | None = None,
) -> xr.DataArray:  # fmt: skip
    """`scale · q_i·k_j` of one query with every key [part, key], split over the subspaces of `contrastive_qk`.

    With P and R the projections on the first `rank` directions of query and key, "subspace" is `scale · Pq·Rk`, "query"
    `Pq·(k - Rk)`, "key" `(q - Pq)·Rk` and "rest" what is outside on both sides; they sum to the score. Columns of the
    padded batch count, masks are not applied. The record need not be the one that `found` was made of. Where `found`
    was made with `unrotated_by`, give it here too; the score is then that of both sides at position 0.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("Mary and John went to the store , Mary and John went to the store")
    >>> found = hw.analyses.contrastive_qk(record, "previous")
    >>> hw.analyses.score_parts(record, found, "2.1", query=-1).shape
    (4, 16)
    """
    one = Head.parse(head) if isinstance(head, str) else head
    if one.layer not in found.layer.values:
        raise AnalysisError(f"contrastive_qk did not read layer {one.layer}; give layers= that hold it")
    if found.attrs["rotated"] != (unrotated_by is None):
        told = "behind" if found.attrs["rotated"] else "without"
        raise AnalysisError(
            f"contrastive_qk read queries and keys {told} their rotation; give the same unrotated_by"
        )
    map = _unrotated(record, record.map(one.layer), _turns(record, unrotated_by).get(one.layer))
    at = found.sel(layer=one.layer, head=one.head)
    size, width = int(at["rank"]), map.q.shape[-1]
    u, v = (
        torch.from_numpy(at[name].values[:size, :width].copy())
        for name in ("query_directions", "key_directions")
    )
    group = map.q.shape[1] // map.k.shape[1]
    q = map.q[batch, one.head, query].detach().double().cpu()
    k = map.k[batch, one.head // group].detach().double().cpu()
    inside = q @ u.mT @ u, k @ v.mT @ v
    sides = {"subspace": inside, "query": (inside[0], k - inside[1]), "key": (q - inside[0], inside[1])}
    sides["rest"] = q - inside[0], k - inside[1]
    values = torch.stack([map.rule.scale * sides[part][1] @ sides[part][0] for part in PARTS])
    strings = np.array(record.key_axis.strings[batch], dtype=object).astype(str)
    coords = {"part": list(PARTS), "token": ("key", strings)}
    return xr.DataArray(values.numpy(), dims=("part", "key"), coords=coords, name="score")


def _turns(record: Record, model: HookedModel | None) -> dict[int, Tensor]:
    """The turn from one position to the next by layer; nothing without a model."""
    if model is None:
        return {}
    if record.keys is not None or model.read_only or not model.vocab:
        raise AnalysisError("unrotated_by is for a text model, whose queries and keys are the same tokens")
    if missing := [layer for layer in record.layers if layer not in model.layers]:
        raise AnalysisError(
            f"{model.name} has no layer {missing[0]}, which the record holds; give its own model"
        )
    return query_turns(model, record.query_axis.tokens.flatten()[:1].repeat(2))


def _unrotated(record: Record, map: AttentionMap, turn: Tensor | None) -> AttentionMap:
    """A map whose queries and keys stand at position 0; positions count from the first real token."""
    if turn is None:
        return map
    places = record.query_axis.valid.cpu().long().cumsum(-1) - 1
    q, k = (at_start(x.detach().double().cpu(), turn, places) for x in (map.q, map.k))
    return replace(map, q=q, k=k)


def _labels(
    record: Record, feature: Feature, labels: Tensor | None, key_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The feature at each query and at each key; -1 where there is none, and on padding."""
    own, other = record.query_axis, record.key_axis
    if labels is None and key_labels is not None:
        raise AnalysisError("key_labels= goes with labels=, the feature at each query")
    if labels is None:
        queries, keys = own.tokens.cpu(), other.tokens.cpu()
        if feature == "previous":
            before = other.valid.cpu() & other.valid.cpu().roll(1, 1)
            before[:, 0] = False
            keys = keys.roll(1, 1).masked_fill(~before, -1)
    else:
        queries, keys = labels.cpu(), (labels if key_labels is None else key_labels).cpu()
    for name, given, axis in ("labels", queries, own), ("key_labels", keys, other):
        if given.shape != axis.valid.shape or given.is_floating_point():
            raise AnalysisError(
                f"{name} should be whole numbers of shape {tuple(axis.valid.shape)}; got {given.dtype} of "
                f"shape {tuple(given.shape)}"
            )
    return queries.long().masked_fill(~own.valid.cpu(), -1), keys.long().masked_fill(~other.valid.cpu(), -1)


def _shuffled(keys: Tensor, seed: int) -> Tensor:
    """The labels of each text's keys in a random order; where there are none, there are none."""
    generator, found = torch.Generator().manual_seed(seed), keys.clone()
    for row in found:
        places = (row >= 0).nonzero()[:, 0]
        row[places] = row[places[torch.randperm(len(places), generator=generator)]]
    return found


def _covariances(map: AttentionMap, queries: Tensor, keys: Tensor, cross: bool) -> tuple[Tensor, Tensor]:
    """`mean_i q_i k̄_iᵀ` over keys that match and over the others [2, head, d, d], and the number of queries [head]."""
    batch, heads, length, width = map.shape
    apart = heads if map.rule.mask.extra is not None else 1  # a mask given as a function may differ by head
    d, group = map.q.shape[-1], heads // map.k.shape[1]
    total = torch.zeros(2, heads, d, d, dtype=torch.float64)
    count = torch.zeros(heads, dtype=torch.long)
    step = max(PAIRS // max(width * apart, 1), 1)
    for row in range(batch):
        k = map.k[row].detach().double().cpu()
        k = k if apart == 1 else k.repeat_interleave(group, 0)
        for begin in range(0, length, step):
            rows = slice(begin, min(begin + step, length))
            columns = slice(*map.rule.mask.key_span(rows.start, rows.stop))
            block = Block(slice(row, row + 1), torch.arange(heads), rows, columns)
            of_query, of_key = queries[row, rows, None], keys[row, None, columns]
            pairs = ((of_query >= 0) & (of_key >= 0))[None]
            seen = map.rule.mask.tile(block, torch.device("cpu"))
            pairs = pairs if seen is None else pairs & seen[0]
            if not cross:
                at, place = block.positions(torch.device("cpu"))
                pairs = pairs & (at + map.rule.mask.shift != place)[0]
            kinds = pairs & (of_query == of_key), pairs & (of_query != of_key)
            both = kinds[0].any(-1) & kinds[1].any(-1)  # [1 or head, row]
            count += both.sum(-1)
            q = map.q[row, :, rows].detach().double().cpu()
            for place, kind in enumerate(kinds):
                weights = kind.double() * (both.double() / kind.sum(-1).clamp(min=1))[..., None]
                means = weights @ k[:, columns]
                total[place] += q.mT @ means.repeat_interleave(heads // len(means), 0)
    return total / count.clamp(min=1)[:, None, None], count


def _split(mean: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The mean score of a mean `q kᵀ` [d, d] by part [part]; left [d, n] and right [n, d] span the subspaces."""
    inside, across = left @ left.mT, right.mT @ right
    query, key = inside @ mean, mean @ across
    both = (inside @ key).trace()
    return scale * torch.stack(
        [both, query.trace() - both, key.trace() - both, (mean - query - key).trace() + both]
    )


def _stacked(layers: list[Tensor]) -> Tensor:
    """Layers one above the other; NaN where the heads of a layer have fewer channels than those of another."""
    whole = torch.Size(max(sizes) for sizes in zip(*(each.shape for each in layers), strict=True))
    if all(each.shape == whole for each in layers):
        return torch.stack(layers)
    found = layers[0].new_full((len(layers), *whole), torch.nan)
    for place, each in zip(found, layers, strict=True):
        place[tuple(slice(size) for size in each.shape)] = each
    return found
