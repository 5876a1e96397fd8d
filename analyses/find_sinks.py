"""Finds attention sinks: the tokens on which heads put much more weight than on others, by three published
rules.

share: a fixed threshold on the received share; gu: the same on the first 64 tokens (Gu et al., ICLR 2025);
act: the threshold alpha/N with the first sink left out (Yu et al., ICML 2024). Costs column statistics; finds
where attention goes, not whether the values there matter.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import xarray as xr

from headwater.analyses._about import About
from headwater.analyses._received import received_share
from headwater.analyses._settings import Bounds
from headwater.lens.errors import AnalysisError
from headwater.lens.record import Record

ABOUT = About(
    question="Which tokens are attention sinks, and for which heads?",
    unit="score: mean weight a token gets per query that sees it; heads: fraction of (layer, head)",
    paper="Gu et al., ICLR 2025, arXiv:2410.10781 (gu); Yu et al., ICML 2024, arXiv:2406.15765 (act)",
    inputs="record",
    cost="the statistics received and visible; gu: one transposed attention pass per layer; memory O(layers·heads·S)",
    not_for="saying that a sink carries nothing; texts of a few tokens, where every share is large",
)

Rule = Literal["share", "gu", "act"]
FIXED = 0.3  # Gu et al.'s epsilon


def find_sinks(
    record: Record,
    rule: Annotated[Rule, "fixed share, Gu's on the first tokens, or ACT's alpha/N"] = "share",
    threshold: Annotated[
        float | None, "share above which a token is a sink; none: 0.3, for act alpha/N", Bounds(0.0)
    ] = None,
    alpha: Annotated[float, "act: multiples of the uniform share 1/N", Bounds(0.0)] = 5.0,
    length: Annotated[int | None, "gu: tokens of each text that count; none: all", Bounds(1)] = 64,
    drop_first: Annotated[bool, "act: leave the first sink of each head out, as the initial token's"] = True,
    min_queries: Annotated[int, "tokens that fewer queries see are not judged", Bounds(1)] = 1,
    unit_rows: Annotated[
        bool, "divide each row by its mass first (learned sinks, other normalisers)"
    ] = False,
) -> xr.Dataset:
    """With `α_j = Σ_i A_ij / #{i that see j}` a token j is a sink of a head when `α_j` exceeds the threshold,
    strictly.

    `share`: over the whole record, threshold 0.3. `gu`: over the first `length` real tokens of each text,
    threshold ε = 0.3; the mean of `heads` over texts is the paper's `Sink_j` (in [0, 1], not in per cent).
    `act`: threshold `alpha / N` for N real tokens, or a fixed one; `drop_first` removes each head's first
    detected token, which the authors take for the initial-token sink and leave alone.

    Dataset: `score` [batch, layer, head, key] is α, `sink` [batch, layer, head, key] the verdict, `heads`
    [batch, key] the fraction of (layer, head) whose sink the token is; `found_*` [found] list the sinks one
    by one, largest score first, with batch, layer, head, position (column), token and score. Padding and
    tokens that no query sees have NaN scores and are never sinks; so have, with `min_queries`, tokens near the
    end of a causal text, whose share is the mean of a few weights (the last token's is its weight on itself).
    Unit: weight. Source: the authors' code, checked (the threshold alpha/N: paper text); `min_queries` is ours.
    """
    if min_queries < 1:
        raise AnalysisError(f"min_queries={min_queries} is too few; give 1 or more")
    if rule not in ("share", "gu", "act"):
        raise AnalysisError(f"rule={rule!r} is unknown; give share, gu or act")
    if threshold is not None and threshold < 0:
        raise AnalysisError(f"threshold={threshold} is negative; give a share of 0 or more")
    score = _first_tokens(record, length, unit_rows) if rule == "gu" else received_share(record, unit_rows)
    counts = xr.DataArray(record.valid.sum(1).numpy(), dims="batch")
    fixed = xr.DataArray(FIXED if threshold is None else threshold)
    limit = alpha / counts if rule == "act" and threshold is None else fixed
    if min_queries > 1:
        score = score.where(record.statistic("visible") >= min_queries)
    sink = score > limit
    if rule == "act" and drop_first:
        sink = sink & (sink.cumsum("key") > 1)
    heads = sink.mean(("layer", "head")).where(score.notnull().any(("layer", "head")))
    result = xr.Dataset({"score": score, "sink": sink, "heads": heads, **_list(record, score, sink)})
    settings = {
        "rule": rule,
        "threshold": limit.values.tolist(),
        "min_queries": min_queries,
        "unit_rows": unit_rows,
    }
    settings |= {"gu": {"length": length}, "act": {"alpha": alpha, "drop_first": drop_first}}.get(rule, {})
    return result.assign_attrs(ABOUT.attrs(record.provenance, **settings))


def _first_tokens(record: Record, length: int | None, unit_rows: bool) -> xr.DataArray:
    """α of each text cut to its first `length` tokens; for causal maps that is the same as leaving the rest
    out."""
    if length is not None and length < 1:
        raise AnalysisError(f"length={length} is too short; give 1 token or more, or None for all")
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
    places = np.argwhere(sink.transpose("batch", "layer", "head", "key").values)
    values = score.transpose("batch", "layer", "head", "key").values[tuple(places.T)]
    order = np.argsort(-values, kind="stable")
    batch, layer, head, key = places[order].T
    columns = {
        "batch": batch,
        "layer": np.asarray(record.layers)[layer],
        "head": head,
        "position": key,
        "token": np.array([record.strings[b][k] for b, k in zip(batch, key, strict=True)], dtype=str),
        "score": values[order],
    }
    return {f"found_{name}": xr.DataArray(column, dims="found") for name, column in columns.items()}
