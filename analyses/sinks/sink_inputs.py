"""Dependence of sinks on the input: natural text, random tokens, and one repeated token.

Gu et al., ICLR 2025 (arXiv 2410.10781): sinks also form on random tokens; on one repeated token they form only with
learned or absolute positions. Three recordings of column statistics. It shows where attention goes, not why.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws
from headwater.analyses._measures.bootstrap import interval, intervals
from headwater.analyses._prompts.examples import (
    Batch,
    Examples,
    as_tokens,
    first_tokens,
    joined,
    repeated_tokens,
    shape_of,
    singles_of,
)
from headwater.analyses.sinks.sink_rate import sink_rate
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.axes import TEXTS
from headwater.lens.models.signature import markers
from headwater.lens.progress import progress

INPUTS = ("natural", "random", "repeated")


@analysis
def sink_inputs(
    model: HookedModel,
    examples: Examples,
    length: Annotated[int, "tokens of each text that are read; shorter texts set it lower", Bounds(2)] = 64,
    threshold: Annotated[float, "share above which the token is a sink", Bounds(0.0, 1.0)] = 0.3,
    key: Annotated[int, "the token, counted from the first; 0 is the first"] = 0,
    keep_start: Annotated[int, "first tokens that stay, such as a special token", Bounds(0)] = 0,
    draws: Draws = 1000,
    seed: Annotated[int, "seed of the tokens and of the draws", Bounds(0)] = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """`rate` [input, batch]: the fraction of (layer, head) whose share α of token `key` exceeds `threshold`.

    `input` is "natural" (the first tokens of the text), "random" (as many ordinary tokens, drawn uniformly) or
    "repeated" (one such token throughout, another for each text). All have the same length: `length`, or that of the
    shortest text (attribute `length`). `mean`, `low`, `high` [input] over texts, with 95 % bootstrap bounds;
    `above_random` and `above_repeated` [bound], mean and bounds of the paired difference natural minus other input.
    `received_share` [input, batch, layer, head] is α. `keep_start` keeps the first tokens of every text, e.g. 1 for a
    special token at the start. With 0, a model without positions has uniform rows on a repeated token, `A_ik = 1/i`,
    and α of the first of T tokens is H_T/T.

    Question: Does the sink stay when the text is random tokens, or one token repeated?
    Unit: rate: fraction of (layer, head); shares are mean weights per query that sees the key.
    Source: Gu et al., ICLR 2025, arXiv:2410.10781; metric held to the authors' code, the draw of random tokens and the
    special token from memory.
    Cost: three recordings of each text's first tokens with two statistics, memory O(S).
    Not for: what makes the sink; texts of other lengths, as shares fall with length.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> found = hw.analyses.sink_inputs(model, "When Mary and John went to the store", length=8, draws=10)
    >>> found.rate.dims, found.input.values.tolist()
    (('input', 'batch'), ['natural', 'random', 'repeated'])
    """
    natural = _natural(model, examples, length)
    ids = words_of(model, natural.ids)
    if keep_start >= ids.shape[1]:
        raise AnalysisError(f"keep_start={keep_start} leaves nothing to draw of {ids.shape[1]} tokens")
    count, longest = ids.shape
    random = repeated_tokens(model, longest, count, seed, None)[:, :longest]
    one = repeated_tokens(model, 1, count, seed + 1, None)[:, :1]
    texts = {"natural": ids, "random": random.to(ids), "repeated": one.to(ids)}
    stays = torch.isin(ids, torch.tensor(list(markers(model.hf).values()), dtype=ids.dtype))
    stays[:, :keep_start] = True
    shares = []
    for name in progress(INPUTS, desc="sink inputs", unit="input"):
        given = torch.where(stays, ids, texts[name].expand_as(ids))
        found = [
            sink_rate(model.record(part, statistics=("received", "visible"), keep=()), threshold, key)
            for rows in torch.arange(count).split(batch_size)
            for part in [with_words(model, natural.rows(rows), given[rows])]
        ]
        shares.append(xr.concat([one.received_share_per_example for one in found], "batch"))
    share = xr.concat(shares, "input").assign_coords(input=list(INPUTS))
    rate = (share > threshold).where(share.notnull()).mean(("layer", "head"))
    columns = rate.transpose("batch", "input").values
    spread = intervals(columns, ["input"], draws, seed)
    result = xr.Dataset({"rate": rate, "received_share": share, **spread})
    for place, name in enumerate(INPUTS[1:], 1):
        bounds = interval(columns[:, :1] - columns[:, place : place + 1], draws, seed)
        result[f"above_{name}"] = ("bound", np.array(bounds)[:, 0])
    result = result.assign_coords(bound=["mean", "low", "high"])
    return result.assign_attrs(length=longest, examples=count)


def _natural(model: HookedModel, examples: Examples, length: int) -> Batch:
    """The first tokens of every text, cut to one length, in their order; whole examples where more belongs to them."""
    part = model.parts[model.part_name]
    if part.crosses or part.queries not in TEXTS:
        raise AnalysisError(f"{model.name} is read as its {model.part_name}; this analysis draws words")
    rows = singles_of(model, examples)
    shortest = min(words_of(model, row).shape[1] for row in rows)
    if shortest < 2:
        raise AnalysisError("an example has one token; a sink is told from the others in two or more")
    if part.queries != "encoder" and not any(_holds_places(model, row) for row in rows):
        rows = [first_tokens([row], min(length, shortest)) for row in rows]
    if len({shape_of(model, row) for row in rows}) > 1:
        raise AnalysisError("these examples can not be cut to one length; give examples of equal length")
    return Batch(joined(rows), list(range(len(rows))))


def _holds_places(model: HookedModel, row: Tensor) -> bool:
    """Whether tokens of a text stand for a picture or sound, so that it can not be cut."""
    return bool(
        torch.isin(row.as_subclass(Tensor), torch.tensor(list(markers(model.hf).values())).to(row)).any()
    )


def words_of(model: HookedModel, rows: Tensor) -> Tensor:
    """The word ids [row, position] on the axis of the model's part."""
    encoder = model.parts[model.part_name].queries == "encoder"
    return as_tokens(rows).more["input_ids"] if encoder else rows.as_subclass(Tensor)


def with_words(model: HookedModel, rows: Tensor, words: Tensor) -> Tensor:
    """The same rows with other words on the axis of the model's part."""
    if model.parts[model.part_name].queries == "encoder":
        tokens = as_tokens(rows)
        return tokens.changed(tokens.ids, tokens.mask, {**tokens.more, "input_ids": words})
    return Batch(rows, [0]).rows(slice(None), words)
