"""Head similarity: how alike the attention maps of any two heads of a model are.

Cosine or Jensen–Shannon between whole maps, computed block by block: the memory is one block of rows of all maps,
whatever the length. Two heads with the same map may move different values.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.lens.errors import AnalysisError
from headwater.lens.naming.heads import every_head
from headwater.lens.records.record import Record

ELEMENTS = 2**22  # weights in one block of rows of all heads
FLOOR = 1e-30


@analysis
def head_similarity(
    record: Record,
    by: Annotated[Literal["cosine", "jensen_shannon"], "angle of maps, or overlap of rows"] = "cosine",
    per_example: Annotated[bool, "keep one matrix per batch row instead of their mean"] = False,
) -> xr.DataArray:
    """Similarity [head, other] of every pair of heads of all layers, named "layer.head"; or [batch, head, other].

    `cosine`: `Σ_ij A_ij B_ij / (‖A‖_F ‖B‖_F)` over a text. `jensen_shannon`: `1 - mean_i JS(a_i, b_i) / ln 2` with
    `JS(a, b) = H((a + b)/2) - (H(a) + H(b))/2`. Each row is divided by its sum first, and a row that is empty in one of
    the two maps is left out. The mean over texts follows. Equal maps have 1; a head without any weight has NaN. The
    coordinates `layer` and `index` hold the numbers behind each name. AnalysisError for Jensen–Shannon of signed maps.

    Question: Which heads look the same way?
    Unit: similarity, 0 to 1 (cosine of signed weights: from -1).
    Source: cosine: common practice; Jensen–Shannon: Lin 1991, between heads as in Clark et al. 2019,
    arXiv:1906.04341; definitions from memory.
    Cost: time O(heads² · S²) over all heads of the model, memory O(heads · S).
    Not for: saying that heads are redundant: they may look alike and carry different values; short texts.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("When Mary and John went to the store , John gave a drink to")
    >>> found = hw.analyses.head_similarity(record)
    >>> found.shape, round(float(found.sel(head="2.1", other="2.1")), 1)
    ((32, 32), 1.0)
    """
    if by == "jensen_shannon" and any(record.map(layer).signed for layer in record.layers):
        raise AnalysisError("the weights are signed, so rows are no shares; take by='cosine'")
    found = _cosine(record) if by == "cosine" else _jensen_shannon(record)
    heads = every_head(record.layers, record.n_heads)
    names, layers, index = [str(head) for head in heads], [h.layer for h in heads], [h.head for h in heads]
    coords = {"head": names, "other": names, "layer": ("head", layers), "index": ("head", index)}
    result = xr.DataArray(found.numpy(), coords, ("batch", "head", "other"), name="head_similarity")
    return result.assign_coords(batch=np.arange(len(found))) if per_example else result.mean("batch")


def _blocks(record: Record):
    """Blocks of rows of the maps of all heads, [batch, layer · head, row, key] in float64."""
    maps = [record.map(layer) for layer in record.layers]
    batch, heads, queries, keys = maps[0].shape
    step = max(ELEMENTS // (batch * heads * len(maps) * keys), 1)
    for begin in range(0, queries, step):
        rows = slice(begin, min(begin + step, queries))
        yield torch.cat([map.tile(rows, slice(0, keys)).double().cpu() for map in maps], 1)


def _cosine(record: Record) -> Tensor:
    products = sum(block.flatten(2) @ block.flatten(2).mT for block in _blocks(record))
    assert isinstance(products, Tensor)
    lengths = products.diagonal(dim1=1, dim2=2).sqrt()
    return products / (lengths[:, :, None] * lengths[:, None])  # 0 / 0 is NaN


def _jensen_shannon(record: Record) -> Tensor:
    names = len(record.layers) * record.n_heads
    total = torch.zeros(len(record.valid), names, names, dtype=torch.float64)
    counted = torch.zeros_like(total)
    for block in _blocks(record):
        mass = block.sum(-1, keepdim=True)
        rows = block / mass.clamp_min(FLOOR)
        live = (mass[..., 0] > 0).double()
        own = _entropy(rows)
        for head in range(names):  # one head against all others bounds the memory
            middle = _entropy((rows + rows[:, head : head + 1]) / 2)
            both = live * live[:, head : head + 1]
            apart = (middle - (own + own[:, head : head + 1]) / 2) * both
            total[:, head] += apart.sum(-1)
            counted[:, head] += both.sum(-1)
    return 1 - total / counted / np.log(2)


def _entropy(rows: Tensor) -> Tensor:
    return -torch.special.xlogy(rows, rows).sum(-1)
