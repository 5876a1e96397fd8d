"""Attention sinks by five rules: tokens that receive much more weight than others.

share: a fixed threshold on the received share; gu: the same on the first 64 tokens (Gu et al., ICLR 2025); act: the
threshold alpha/N without the first sink (Yu et al., ICML 2024); massive: massive activations in the residual stream
(Kang et al., ICLR 2025); spectral: ours, the leading right singular vector of the map. `lens/records/sinks.py` has the
parts that edits share. The rules find where attention goes, not whether the values there matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses.sinks._received_share import share_and_visible
from headwater.analyses.sinks._singular_vector import leading_shares
from headwater.lens.errors import AnalysisError
from headwater.lens.records import sinks
from headwater.lens.records.record import Record

Rule = Literal["share", "gu", "act", "massive", "spectral"]
DIRECTION = 0.5  # at most one token of a head has more than half of a direction


@analysis(keep=("qk", "residual"))
def find_sinks(
    record: Record,
    rule: Annotated[Rule, "fixed share, Gu's, ACT's alpha/N, massive activations, singular vector"] = "share",
    threshold: Annotated[
        float | None, "score of a sink; none: 0.3, act alpha/N, massive 20, spectral 0.5", Bounds(0.0)
    ] = None,
    alpha: Annotated[float, "act: multiples of the uniform share 1/N", Bounds(0.0)] = 5.0,
    length: Annotated[int | None, "gu: tokens of each text that count; none: all", Bounds(1)] = 64,
    drop_first: Annotated[bool, "act: leave out each head's first sink, the initial token"] = True,
    min_queries: Annotated[
        int | None,
        "tokens that fewer queries see have no score; none: share and gu a quarter, else 1",
        Bounds(1),
    ] = None,
    unit_rows: Annotated[bool, "divide each row by its sum first (learned sinks, normalisers)"] = False,
    dimensions: Annotated[int | Sequence[int] | None, "massive: of the stream; none: search for them"] = None,
) -> xr.Dataset:
    """Token j is a sink of a head if its score, by default `α_j = Σ_i A_ij / #{i that see j}`, exceeds the threshold.

    `share`: α over the whole record, threshold 0.3. `gu`: α over the first `length` real tokens of each text, threshold
    ε = 0.3; the mean of `heads` over texts is the paper's `Sink_j`, as a fraction.
    `act`: threshold `alpha / N` for N real tokens, or `threshold`. `drop_first` removes each head's first sink, as
    the authors take it for the sink at the initial token and leave it alone.
    `massive`: the score is `max_{d in D} |x_d| / sqrt(mean_d x_d² + 1e-6)` of the residual stream x at the input of the
    layer, threshold τ = 20. It has no head axis, and `heads` is the fraction of layers. D are `dimensions`, or up to
    eight dimensions above τ on a text's first token in the middle half of the recorded layers; without any there is no
    sink. The authors use layers from 2 on (LLaMA-2-7B: 1415, 2533). The record must keep "residual".
    `spectral`: the score is `v_j²` with v the right singular vector of A for its largest singular value; the scores sum
    to 1 over the keys, and a pure sink has 1. With threshold 0.5 a head has one sink at most. The attribute `unsettled`
    counts heads whose two largest singular values are too close to separate. The score is not divided by the number of
    queries: in uniform causal attention the first of 64 tokens has 0.46 and the first of 16 has 0.63, so short texts
    need a higher threshold.

    Dataset: `score` and bool `sink` [batch, layer, head, key]; `heads` [batch, key], the fraction of (layer, head) for
    which the token is a sink; `found_*` [found], the list of sinks with batch, layer, head, position (column), token
    and score: the token with the largest `heads` first, and of each token the largest score first. Padding and tokens
    that no query sees have score NaN and are never sinks. `min_queries` does the same to tokens near the end of a
    causal text, whose share is the mean of few weights: the last token's is its weight on itself. By default share and
    gu leave out tokens that fewer than a quarter as many queries see as see the best seen token of that head; the other
    rules leave out none. In cross-attention the tokens are the encoder's.

    Question: Which tokens are attention sinks, and for which heads?
    Unit: score: mean weight a token gets per query that sees it (massive: root mean squares; spectral: share of a
    direction); heads: fraction of (layer, head), or of layers.
    Source: Gu et al., ICLR 2025, arXiv:2410.10781 (gu); Yu et al., ICML 2024, arXiv:2406.15765 (act); Kang et al.,
    ICLR 2025 (massive); held to the authors' code (alpha/N: to the text); `min_queries`, `spectral` and the middle half
    of the layers are ours.
    Cost: the statistics received and visible; gu: one transposed attention pass per layer; spectral: up to 200;
    memory O(layers·heads·S).
    Not for: saying that a sink carries nothing; texts of a few tokens, where every share is large.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("When Mary and John went to the store , John gave a drink to")
    >>> found = hw.analyses.find_sinks(record)
    >>> found.sink.dims, found.found_token.values[0].item()  # a sink of the most heads
    (('batch', 'layer', 'head', 'key'), '<bos>')
    """
    if unit_rows and rule in ("massive", "spectral"):
        raise AnalysisError(f"unit_rows divides the rows of received shares; rule={rule!r} has none")
    if dimensions is not None and rule != "massive":
        raise AnalysisError(f"dimensions={dimensions!r} belong to rule='massive'; got rule={rule!r}")
    counts = xr.DataArray(record.key_axis.valid.sum(1).numpy(), dims="batch")
    default = {"act": alpha / counts, "massive": sinks.TAU, "spectral": DIRECTION}.get(rule, sinks.SHARE)
    limit = xr.DataArray(default if threshold is None else threshold)
    more: dict[str, object] = {}
    seen = record.statistic("visible")
    if rule == "massive":
        score, more["dimensions_"] = _massive(record, float(limit), dimensions)
    elif rule == "spectral":
        score, more["unsettled"] = _spectral(record)
    elif rule == "gu":
        score, seen = _first_tokens(record, length, unit_rows)
    else:
        score, _ = share_and_visible(record, unit_rows)
    seen = seen.max("head") if rule == "massive" else seen
    enough = sinks.seen_enough(torch.as_tensor(seen.values), rule, min_queries)
    score = score.where(seen.copy(data=enough.numpy()))
    sink = score > limit
    if rule == "act" and drop_first:
        places = sink.transpose("batch", "layer", "head", "key")
        sink = places.copy(data=sinks.without_first(torch.as_tensor(places.values)).numpy())
    within = [name for name in ("layer", "head") if name in score.dims]
    heads = sink.mean(within).where(score.notnull().any(within))
    result = xr.Dataset({"score": score, "sink": sink, "heads": heads, **_list(record, score, sink, heads)})
    return result.assign_attrs({"threshold": limit.values.tolist(), **more})


def _massive(record: Record, tau: float, given: int | Sequence[int] | None) -> tuple[xr.DataArray, list[int]]:
    """Scores [batch, layer, key] and the dimensions D."""
    dimensions = sinks.first_dimensions(record, tau) if given is None else np.atleast_1d(given).tolist()
    width = record.residual(record.layers[0]).shape[-1]
    if wrong := [d for d in dimensions if not 0 <= d < width]:
        raise AnalysisError(
            f"dimensions holds {wrong[0]}; the residual stream has dimensions 0 to {width - 1}"
        )
    scores = sinks.massive_scores(record, dimensions).double()
    scores = scores.masked_fill(~record.valid[:, None], torch.nan)
    coords = {"layer": record.layers, "token": (("batch", "key"), np.array(record.strings, dtype=object))}
    return xr.DataArray(scores.numpy(), dims=("batch", "layer", "key"), coords=coords), dimensions


def _spectral(record: Record) -> tuple[xr.DataArray, int]:
    """Scores [batch, layer, head, key] and the number of heads that did not converge."""
    found = [leading_shares(record.map(layer)) for layer in record.layers]
    template = record.statistic("visible")
    scores = template.copy(data=torch.stack([shares for shares, _ in found], 1).double().numpy())
    scores = scores.where(template > 0).where(
        xr.DataArray(record.key_axis.valid.numpy(), dims=("batch", "key"))
    )
    return scores.drop_attrs().rename("leading_share"), int(sum((~settled).sum() for _, settled in found))


def _first_tokens(record: Record, length: int | None, unit_rows: bool) -> tuple[xr.DataArray, xr.DataArray]:
    """`share_and_visible` of the first `length` tokens of each text; a causal map needs no second run for that."""
    longest = int(record.key_axis.valid.sum(1).max())
    if length is None or longest <= length:
        return share_and_visible(record, unit_rows)
    if not record.causal:
        raise AnalysisError(
            f"a text has {longest} tokens and sees ahead, so it can not be cut to {length} afterwards; "
            f"record its first {length} tokens or give length=None"
        )
    early = record.valid & (record.valid.cumsum(1) <= length)
    kept = xr.DataArray(early.numpy(), dims=("batch", "key"))
    share, seen = share_and_visible(record, unit_rows, early)
    return share.where(kept), seen


def _list(
    record: Record, score: xr.DataArray, sink: xr.DataArray, heads: xr.DataArray
) -> dict[str, xr.DataArray]:
    """The sinks one by one: the token that is a sink of most heads first, and of each token the largest score."""
    dims = [name for name in ("batch", "layer", "head", "key") if name in score.dims]
    places = np.argwhere(sink.transpose(*dims).values)
    values = score.transpose(*dims).values[tuple(places.T)]
    row, column = places[:, dims.index("batch")], places[:, dims.index("key")]
    order = np.lexsort((-values, column, row, -heads.transpose("batch", "key").values[row, column]))
    columns: dict[str, np.ndarray] = dict(zip(dims, places[order].T, strict=True))
    columns["layer"] = np.asarray(record.layers)[columns["layer"]]
    columns["position"] = columns.pop("key")
    strings = np.array(record.key_axis.strings, dtype=object)
    columns["token"] = strings[columns["batch"], columns["position"]].astype(str)
    columns["score"] = values[order]
    return {f"found_{name}": xr.DataArray(column, dims="found") for name, column in columns.items()}
