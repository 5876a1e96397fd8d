"""Finds attention sinks: the tokens on which heads put much more weight than on others, by five rules.

share: a fixed threshold on the received share; gu: the same on the first 64 tokens (Gu et al., ICLR 2025); act: the
threshold alpha/N with the first sink left out (Yu et al., ICML 2024); massive: massive activations in the residual
stream (Kang et al., ICLR 2025); spectral: ours, the leading direction of the map. What each rule means is in
`lens/records/sinks.py` and here. Costs column statistics (massive: a record of the stream; spectral: up to 200 passes
per layer); finds where attention goes, not whether the values there matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses.sinks._received_share import received_share
from headwater.analyses.sinks._singular_vector import leading_shares
from headwater.lens.errors import AnalysisError
from headwater.lens.records import sinks
from headwater.lens.records.record import Record

Rule = Literal["share", "gu", "act", "massive", "spectral"]
DIRECTION = 0.5  # more than half of a direction: one token of a head at most


@analysis(keep=("qk", "residual"))
def find_sinks(
    record: Record,
    rule: Annotated[
        Rule, "fixed share, Gu's on the first tokens, ACT's alpha/N, massive activations, leading direction"
    ] = "share",
    threshold: Annotated[
        float | None,
        "score above which a token is a sink; none: 0.3, act alpha/N, massive 20, spectral 0.5",
        Bounds(0.0),
    ] = None,
    alpha: Annotated[float, "act: multiples of the uniform share 1/N", Bounds(0.0)] = 5.0,
    length: Annotated[int | None, "gu: tokens of each text that count; none: all", Bounds(1)] = 64,
    drop_first: Annotated[bool, "act: leave the first sink of each head out, as the initial token's"] = True,
    min_queries: Annotated[int, "tokens that fewer queries see are not judged", Bounds(1)] = 1,
    unit_rows: Annotated[
        bool, "divide each row by its mass first (learned sinks, other normalisers)"
    ] = False,
    dimensions: Annotated[
        int | Sequence[int] | None, "massive: dimensions of the stream; none: those found on the first token"
    ] = None,
) -> xr.Dataset:
    """With `α_j = Σ_i A_ij / #{i that see j}` a token j is a sink of a head when `α_j` exceeds the threshold,
    strictly.

    `share`: over the whole record, threshold 0.3. `gu`: over the first `length` real tokens of each text,
    threshold ε = 0.3; the mean of `heads` over texts is the paper's `Sink_j` (in [0, 1], not in per cent).
    `act`: threshold `alpha / N` for N real tokens, or a fixed one; `drop_first` removes each head's first
    detected token, which the authors take for the initial-token sink and leave alone.
    `massive`: the score is `max_{d in D} |x_d| / sqrt(mean_d x_d² + 1e-6)` of the stream x entering the layer,
    threshold τ = 20; a sink is one for every head, so there is no head axis, and `heads` is the fraction of layers.
    Without `dimensions` D are those, eight at most, above τ on a text's first token in the middle half of the recorded
    layers; where there are none nothing is a sink. The authors use layers from 2 on (LLaMA-2-7B: 1415, 2533). Needs a
    record with `keep=("residual",)` beside what else it keeps.
    `spectral`: the score is `v_j²`, v being the right singular vector of A to its largest singular value; these sum
    to 1 over the keys, and a pure sink has 1. Threshold 0.5, so that a head has one sink at most. `unsettled` counts
    heads whose two largest singular values were too close to tell the vectors apart. Not divided by how many queries
    see a key: under uniform causal attention the first token has 0.46 of
    64 tokens and 0.63 of 16, so that short texts need a higher threshold.

    Dataset: `score` [batch, layer, head, key] is that number, `sink` [batch, layer, head, key] the verdict, `heads`
    [batch, key] the fraction of (layer, head) whose sink the token is; `found_*` [found] list the sinks one
    by one, largest score first, with batch, layer, head, position (column), token and score. Padding and
    tokens that no query sees have NaN scores and are never sinks; so have, with `min_queries`, tokens near the
    end of a causal text, whose share is the mean of a few weights (the last token's is its weight on itself).
    Unit: weight; massive: root mean squares; spectral: share of a direction. Source: the authors' code, checked (the
    threshold alpha/N: paper text); `min_queries`, `spectral` and where D is looked for in other records are ours.

    Question: Which tokens are attention sinks, and for which heads?
    Unit: score: mean weight a token gets per query that sees it (massive: root mean squares; spectral: share of a
    direction); heads: fraction of (layer, head), or of layers.
    Source: Gu et al., ICLR 2025, arXiv:2410.10781 (gu); Yu et al., ICML 2024, arXiv:2406.15765 (act); Kang et al.,
    ICLR 2025 (massive).
    Cost: the statistics received and visible; gu: one transposed attention pass per layer; spectral: up to 200;
    memory O(layers·heads·S).
    Not for: saying that a sink carries nothing; texts of a few tokens, where every share is large.
    """
    if unit_rows and rule in ("massive", "spectral"):
        raise AnalysisError(f"unit_rows divides the rows of received shares; rule={rule!r} has none")
    if dimensions is not None and rule != "massive":
        raise AnalysisError(f"dimensions={dimensions!r} belong to rule='massive'; got rule={rule!r}")
    counts = xr.DataArray(record.valid.sum(1).numpy(), dims="batch")
    default = {"act": alpha / counts, "massive": sinks.TAU, "spectral": DIRECTION}.get(rule, sinks.SHARE)
    limit = xr.DataArray(default if threshold is None else threshold)
    more: dict[str, object] = {}
    if rule == "massive":
        score, more["dimensions"] = _massive(record, float(limit), dimensions)
    elif rule == "spectral":
        score, more["unsettled"] = _spectral(record)
    else:
        score = (
            _first_tokens(record, length, unit_rows) if rule == "gu" else received_share(record, unit_rows)
        )
    if min_queries > 1:
        seen = record.statistic("visible")
        score = score.where((seen.max("head") if rule == "massive" else seen) >= min_queries)
    sink = score > limit
    if rule == "act" and drop_first:
        places = sink.transpose("batch", "layer", "head", "key")
        sink = places.copy(data=sinks.without_first(torch.as_tensor(places.values)).numpy())
    within = [name for name in ("layer", "head") if name in score.dims]
    heads = sink.mean(within).where(score.notnull().any(within))
    result = xr.Dataset({"score": score, "sink": sink, "heads": heads, **_list(record, score, sink)})
    settings = {"threshold": limit.values.tolist()}
    settings |= {"unit_rows": unit_rows, **more}
    settings |= {"gu": {"length": length}, "act": {"alpha": alpha, "drop_first": drop_first}}.get(rule, {})
    return result.assign_attrs(settings)


def _massive(record: Record, tau: float, given: int | Sequence[int] | None) -> tuple[xr.DataArray, list[int]]:
    """Scores [batch, layer, key] and the dimensions they are of."""
    if given is None:
        dimensions = sinks.first_dimensions(record, tau)
    else:
        dimensions = [given] if isinstance(given, int) else [int(d) for d in given]
        width = record.residual(record.layers[0]).shape[-1]
        wrong = [d for d in dimensions if not 0 <= d < width]
        if wrong:
            raise AnalysisError(
                f"dimensions holds {wrong[0]}; the residual stream has dimensions 0 to {width - 1}"
            )
    scores = sinks.massive_scores(record, dimensions).double()
    scores = scores.masked_fill(~record.valid[:, None], torch.nan)
    coords = {"layer": record.layers, "token": (("batch", "key"), np.array(record.strings, dtype=object))}
    return xr.DataArray(scores.numpy(), dims=("batch", "layer", "key"), coords=coords), dimensions


def _spectral(record: Record) -> tuple[xr.DataArray, int]:
    """Scores [batch, layer, head, key] and how many heads have not settled."""
    found = [leading_shares(record.map(layer)) for layer in record.layers]
    template = record.statistic("visible")
    scores = template.copy(data=torch.stack([shares for shares, _ in found], 1).double().numpy())
    scores = scores.where(template > 0).where(xr.DataArray(record.valid.numpy(), dims=("batch", "key")))
    return scores.drop_attrs().rename("leading_share"), int(sum((~settled).sum() for _, settled in found))


def _first_tokens(record: Record, length: int | None, unit_rows: bool) -> xr.DataArray:
    """α of each text cut to its first `length` tokens; for causal maps that is the same as leaving the rest
    out."""
    longest = int(record.valid.sum(1).max())
    if length is None or longest <= length:
        return received_share(record, unit_rows)
    if not record.causal:
        raise AnalysisError(
            f"a text has {longest} tokens and sees ahead, so it can not be cut to {length} afterwards; "
            f"record its first {length} tokens or give length=None"
        )
    early = record.valid & (record.valid.cumsum(1) <= length)
    kept = xr.DataArray(early.numpy(), dims=("batch", "key"))
    return received_share(record, unit_rows, early).where(kept)


def _list(record: Record, score: xr.DataArray, sink: xr.DataArray) -> dict[str, xr.DataArray]:
    dims = [name for name in ("batch", "layer", "head", "key") if name in score.dims]
    places = np.argwhere(sink.transpose(*dims).values)
    values = score.transpose(*dims).values[tuple(places.T)]
    order = np.argsort(-values, kind="stable")
    columns: dict[str, np.ndarray] = dict(zip(dims, places[order].T, strict=True))
    columns["layer"] = np.asarray(record.layers)[columns["layer"]]
    columns["position"] = columns.pop("key")
    columns["token"] = np.array(
        [record.strings[b][k] for b, k in zip(columns["batch"], columns["position"], strict=True)], dtype=str
    )
    columns["score"] = values[order]
    return {f"found_{name}": xr.DataArray(column, dims="found") for name, column in columns.items()}
