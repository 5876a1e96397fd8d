"""Raw attention: the weights of chosen layers and heads as they are, averaged (or the largest or smallest).

It is the baseline for every other attribution by attention. Only the rows of the queries asked for are computed and
stored.
"""

from __future__ import annotations

import functools
import itertools
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._prompts.positions import Positions, columns_of, position_coordinates
from headwater.analyses.tokens._layer_map import EXTREMES
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import AnalysisError
from headwater.lens.naming.heads import HeadNames, named
from headwater.lens.records.record import Record

FEW = 256  # queries whose rows are read as one tile each; for more, all rows are read in blocks
JOIN = {"mean": torch.add, "max": torch.maximum, "min": torch.minimum}  # of two layers


@analysis
def raw_attention(
    record: Record,
    queries: Annotated[Positions, 'positions that look, e.g. -1; "all" for every one'] = (-1,),
    layers: Annotated[Positions, 'layers to aggregate, -1 is the last recorded; "all" for every one'] = (-1,),
    heads: Annotated[HeadNames, 'heads such as "2.1 3.0"; "all" for those of the layers'] = "all",
    over: Annotated[Literal["mean", "max", "min"], "how heads and layers become one row"] = "mean",
    keys: Annotated[Positions | None, "tokens that are looked at; none: all"] = None,
) -> xr.DataArray:
    """`a[i, j] = mean over the chosen heads of A_ij`, as [batch, query, key]; `over` may take the largest or smallest.

    Heads of all chosen layers have the same weight. If `heads` names heads, `layers` is not read. With `keys` and
    `queries="all"` the result holds columns: who looks at these tokens.
    In cross-attention the keys are the encoder's tokens.

    Question: Which tokens does a position look at?
    Unit: attention weight, a row sums to 1 where heads have no learned sink (the mean; the largest: more).
    Source: the baseline of Abnar & Zuidema 2020, arXiv:2005.00928.
    Cost: the rows asked for, layers·heads·queries·S weights; memory O(S·queries).
    Not for: what a deep layer draws from the input: its keys are mixtures of tokens already.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> record = model.record("When Mary and John went to the store , John gave a drink to")
    >>> found = hw.analyses.raw_attention(record, heads="2.0")  # queries=(-1,): the last token
    >>> found.shape, found.key_token.values[0, found[0, 0].values.argmax()].item()
    ((1, 1, 15), 'Mary')
    """
    chosen = _chosen(record, layers, heads)
    columns = columns_of(queries, record.valid, "queries")
    count = sum(len(picked) for picked in chosen.values())

    def of_layer(layer: int, picked: list[int]) -> Tensor:
        weights = _rows(record.map(layer), columns, picked, over)
        return weights * len(picked) / count if over == "mean" else weights

    rows = functools.reduce(JOIN[over], itertools.starmap(of_layer, chosen.items()))
    looked_at = record.key_axis
    blank = ~record.valid.gather(1, columns)[..., None] | ~looked_at.valid[:, None]
    rows = rows.masked_fill(blank, torch.nan)
    asked = None if keys is None else columns_of(keys, looked_at.valid, "keys")
    if asked is not None:
        rows = rows.gather(2, asked[:, None].expand(-1, columns.shape[1], -1))
    return xr.DataArray(
        rows.numpy(),
        dims=("batch", "query", "key"),
        coords=position_coordinates(
            record, queries, columns, "all" if keys is None else keys, asked, looked_at
        ),
        name="raw_attention",
        attrs={"heads": [f"{x}.{h}" for x, picked in chosen.items() for h in picked]},
    )


def _chosen(record: Record, layers: Positions, heads: HeadNames) -> dict[int, list[int]]:
    """The chosen heads of each layer."""
    if heads != "all":
        found: dict[int, list[int]] = {}
        for layer, head in named(heads, record.layers, record.n_heads, "the record"):
            found.setdefault(layer, []).append(head)
        if not found:
            raise AnalysisError('heads is empty; give heads such as "2.1", or "all"')
        return found
    known = record.layers
    asked = known if layers == "all" else np.atleast_1d(np.asarray(layers)).tolist()
    numbers = [known[layer] if -len(known) <= layer < 0 else layer for layer in asked]
    if far := [layer for layer in numbers if layer not in known]:
        raise AnalysisError(f"layer {far[0]} is not in this record; it has layers {known}")
    if not numbers:
        raise AnalysisError('layers is empty; give layer numbers, -1 for the last, or "all"')
    return {number: list(range(record.n_heads)) for number in numbers}


def _rows(map: AttentionMap, columns: Tensor, heads: list[int], over: str) -> Tensor:
    """Joined rows of the asked columns [batch, asked], in float32: [batch, asked, key]."""
    keys = map.shape[3]
    out = torch.zeros(*columns.shape, keys)
    asked = columns.unique()
    if len(asked) <= FEW:
        tiles = (slice(int(row), int(row) + 1) for row in asked)
        blocks = ((rows, map.tile(rows, slice(0, keys), heads)) for rows in tiles)
    else:
        blocks = map.row_blocks(heads)
    for rows, weights in blocks:
        weights = weights.cpu()
        merged = weights.mean(1) if over == "mean" else EXTREMES[over](weights, dim=1)
        text, place = ((columns >= rows.start) & (columns < rows.stop)).nonzero(as_tuple=True)
        out[text, place] = merged[text, columns[text, place] - rows.start]
    return out
