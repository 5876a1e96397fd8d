"""Scores by which cache compression ranks keys: what a method keeps of each key–value head.

Three scores guess how much attention a key will get: what it got so far, what the last queries gave it, and what the
mean of future queries would give it. Two norms say how much a value writes, by which released methods weight a score.
Column sums come from one pass per layer and a key–value head's scores from its query heads: no map is made.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.texts import Texts
from headwater.analyses._streams.query_turns import at_start, mean_turn, query_turns
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.weights import head_weights
from headwater.lens.naming.tokens import Tokens
from headwater.lens.progress import progress

SCORES = ("observed", "windowed", "expected")
EPSILON = 1e-4  # added to a score before CriticalKV weights it, as released

Window = Annotated[int, "last queries that the windowed score is of; their keys are always kept", Bounds(1)]
Pool = Annotated[int, "neighbouring keys that the windowed score is a mean of, an odd number", Bounds(1)]
Future = Annotated[int, "positions behind the text that expected queries stand at", Bounds(1)]
Sinks = Annotated[int, "first tokens that the expected score leaves out and always keeps", Bounds(0)]
Group = Annotated[Literal["mean", "sum", "max"], "what is taken over the query heads of a key–value head"]


@analysis
def kv_scores(
    model: HookedModel,
    examples: Examples,
    window: Window = 64,
    pool: Pool = 5,
    future: Future = 512,
    sinks: Sinks = 4,
    group: Group = "mean",
    batch_size: BatchSize = 1,
) -> xr.Dataset:
    """`score` [by, batch, layer, kv_head, key]: how much attention a key is expected to get; the largest are kept.

    "observed" is the mean weight over the queries that see the key (H2O's sum, divided as in kvpress). "windowed" is
    the mean weight from the last `window` queries, then the mean over `pool` neighbours with zeros past the ends
    (SnapKV); their own keys have no score. "expected" is `softmax_j(μ·k_j/√d + k_jᵀ Σ k_j/2d)`, with μ and Σ the mean
    and covariance of the text's queries, turned to each of the `future` positions behind it and averaged (Expected
    Attention); the first `sinks` tokens take no part, neither as queries nor as keys, and have no score. Each is of
    a query head, and `group` is over the heads that share keys. `value_norm` [batch, layer, kv_head, key] is `‖v‖₂`
    and `output_norm` the mean over the group of `‖v W_O‖₁`. `by_value` is `score·‖v‖₂`, for "expected" that of the
    released method; `by_output` is `(score + 10⁻⁴)·output_norm`, the second stage of CriticalKV. NaN: padding, and
    keys without a score, which a method always keeps. A sliding window, a bias of positions and a soft cap are not
    part of "expected". AnalysisError for models that have no cache of a text's keys, for texts that are not longer
    than `window` and `sinks`, and for models that do more to queries than turn them.

    Question: Which keys would a compressed cache keep?
    Unit: attention weight, 0 to 1 (its sum over the group with group="sum"); norms in the model's units.
    Source: kvpress (NVIDIA) as released: ObservedAttention, SnapKV (arXiv:2404.14469), Expected Attention
    (arXiv:2510.00636), CriticalKV (arXiv:2502.03805).
    Cost: one forward and two passes per layer; memory O(layers·S·d).
    Not for: saying that a key is not needed: kv_curve evicts keys and looks at the loss.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.kv_scores(model, text, window=3, sinks=1)
    >>> found.score.shape, int(found.score.sel(by="windowed").isnull()[0, 0, 0].sum())
    ((3, 1, 4, 8, 15), 3)
    """
    refuse_without_cache(model)
    if pool % 2 == 0:
        raise AnalysisError(f"pool={pool}: give an odd number, so that a key stands in the middle")
    texts = Texts.of(model, examples, batch_size)
    heads = model.n_kv_heads
    found = {name: texts.empty(model.n_layers, heads) for name in (*SCORES, "value_norm", "output_norm")}
    turns: dict[int, Tensor] = {}
    for batch in progress(texts.batches, desc="cache scores", unit="batch"):
        if isinstance(batch.ids, Tokens) and batch.ids.more:
            raise AnalysisError("kv_scores reads texts alone; give examples without pictures or other inputs")
        if (length := batch.ids.shape[1]) <= max(window, sinks + 1):
            raise AnalysisError(
                f"a text of {length} tokens is too short for window={window} and sinks={sinks}; give less of both"
            )
        turns = turns or query_turns(model, batch.ids[0, :2].as_subclass(Tensor))
        record = model.record(batch.ids, statistics=("received", "visible"), keep=("qkv",))
        received, visible = (torch.from_numpy(record.statistic(n).values) for n in ("received", "visible"))
        layers = []
        for place, layer in enumerate(model.layers):
            map, value = record.map(layer), record.values[layer].double().cpu()
            each = (
                received[:, place].double() / visible[:, place],
                _windowed(map, window, pool),
                _expected(map, turns[layer], future, sinks),
            )
            scores = [_over_group(of_heads, heads, group) for of_heads in each]
            layers.append((*scores, value.norm(dim=-1), _written(model, layer, value)))
        for name, values in zip(found, zip(*layers, strict=True), strict=True):
            texts.spread(batch, torch.stack(values, 1), found[name])
    score = torch.stack([found[name] for name in SCORES])
    dims = ("batch", "layer", "kv_head", "key")
    weighted = {
        "score": score,
        "by_value": score * found["value_norm"],
        "by_output": (score + EPSILON) * found["output_norm"],
    }
    return xr.Dataset(
        {name: (("by", *dims), values.numpy()) for name, values in weighted.items()}
        | {name: (dims, found[name].numpy()) for name in ("value_norm", "output_norm")},
        coords={
            "by": list(SCORES),
            "layer": model.layers,
            "kv_head": np.arange(heads),
            "token": (("batch", "key"), np.array(texts.keys.strings, dtype=object).astype(str)),
        },
    )


def refuse_without_cache(model: HookedModel) -> None:
    """AnalysisError unless the model is a causal one whose keys a cache holds, and shows them."""
    if model.read_only:
        raise AnalysisError(f"the attention of {model.name} shows no queries and keys: {model.read_only}")
    if not model.causal or model.is_encoder_decoder:
        raise AnalysisError(f"{model.name} keeps no keys of a text for later tokens; give a causal model")


def _windowed(map: AttentionMap, window: int, pool: int) -> Tensor:
    """Mean weight from the last queries, pooled over neighbours, [batch, head, key]; NaN at their own keys."""
    length = map.shape[2]
    mean = map.received(slice(length - window, length)).double()[..., :-window] / window
    pooled = functional.avg_pool1d(mean, pool, stride=1, padding=pool // 2)
    return functional.pad(pooled, (0, window), value=torch.nan)


def _expected(map: AttentionMap, turn: Tensor, future: int, sinks: int) -> Tensor:
    """The share of the weight of mean future queries, [batch, head, key]; NaN at the first `sinks` keys."""
    q, k = map.q.double().cpu(), map.k.double().cpu()
    start = at_start(q, turn, torch.arange(q.shape[2])[None])[:, :, sinks:]
    mean = start.mean(2, keepdim=True)
    centred = start - mean
    average = mean_turn(turn, q.shape[2], future)
    covariance = average.mT @ (centred.mT @ centred / start.shape[2]) @ average
    keys = k[:, :, sinks:].repeat_interleave(q.shape[1] // k.shape[1], 1) * map.rule.scale
    logits = (keys * (mean @ average)).sum(-1) + ((keys @ covariance) * keys).sum(-1) / 2
    return functional.pad(logits.softmax(-1), (sinks, 0), value=torch.nan)


def _over_group(values: Tensor, heads: int, group: str) -> Tensor:
    """Values [batch, head, key] over the query heads of each key–value head, [batch, kv_head, key]."""
    groups = values.unflatten(1, (heads, -1))
    return groups.amax(2) if group == "max" else groups.sum(2) if group == "sum" else groups.mean(2)


def _written(model: HookedModel, layer: int, value: Tensor) -> Tensor:
    """`‖v W_O‖₁` in the mean over the query heads that share the value, [batch, kv_head, key]."""
    output = head_weights(model, layer).W_O.double().cpu().unflatten(0, (value.shape[1], -1))
    norms = [
        torch.stack([(value[:, kv] @ each).norm(p=1, dim=-1) for each in output[kv]]).mean(0)
        for kv in range(value.shape[1])
    ]
    return torch.stack(norms, 1)
