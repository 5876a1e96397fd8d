"""Row support: on how many keys each query's attention lies.

The number of keys that hold nearly all of a row, and the share of keys with more than a tiny weight, tell sparse
attention from dense better than the entropy does, which one sink decides. Rows are read in blocks, so memory is linear
in the length.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.lens.records.record import Record


@analysis
def row_support(
    record: Record,
    share: Annotated[float, "of the row's mass that the keys hold together", Bounds(0.0, 1.0)] = 0.99,
    above: Annotated[float, "weight above which a key counts", Bounds(0.0)] = 0.01,
) -> xr.Dataset:
    """`support` [batch, layer, head, query]: the least number of keys whose weights sum to `share` of the row's sum.

    The largest weights are taken first. Of signed weights the sizes |A_ij| count. `above` [batch, layer, head, query]
    is the share of the visible keys with `|A_ij| > above`, strictly. `mean_support`, `mean_above` [layer, head] are
    means over the queries of a text, then over texts; `relative` [layer, head] is the same mean of the support
    divided by the number of visible keys. Weights on a learned sink belong to no key, and the row's sum is without
    them. Padding and rows without weights are NaN. In cross-attention the keys are the encoder's.

    Question: On how many keys does each head's attention lie?
    Unit: keys; share of the visible keys.
    Source: ours, the usual counts; sparse attention after training is judged by such ones (arXiv:2512.05865).
    Cost: all rows of each layer once and a sort of each row; memory linear in S, time O(layers·heads·S²·log S).
    Not for: which keys could be left out: small weights on many large values may matter.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("When Mary and John went to the store")
    >>> found = hw.analyses.row_support(record)
    >>> found.support[0, 0, 0, 0].item(), bool(found.support.max() <= 9)
    (1.0, True)
    """
    support, many, count = [], [], []
    for layer in record.layers:
        map = record.map(layer)
        seen = map.rule.mask.visible_keys(*map.shape[:2]).expand(map.shape[:3]).double().cpu()
        rows = [_counts(weights, share, above) for _, weights in map.row_blocks()]
        held, larger = (torch.cat(each, 2) for each in zip(*rows, strict=True))
        silent = (held == 0) | ~record.valid[:, None]
        support.append(held.masked_fill(silent, torch.nan))
        many.append((larger / seen).masked_fill(silent, torch.nan))
        count.append(seen)
    found = {"support": torch.stack(support, 1), "above": torch.stack(many, 1)}
    means = {f"mean_{name}": values.nanmean(-1).nanmean(0) for name, values in found.items()}
    means["relative"] = (found["support"] / torch.stack(count, 1)).nanmean(-1).nanmean(0)
    dims = ("batch", "layer", "head", "query")
    return xr.Dataset(
        {name: (dims, values.numpy()) for name, values in found.items()}
        | {name: (("layer", "head"), values.numpy()) for name, values in means.items()},
        coords={
            "layer": record.layers,
            "head": np.arange(record.n_heads),
            "token": (("batch", "query"), np.array(record.strings, dtype=object).astype(str)),
        },
    )


def _counts(weights: Tensor, share: float, above: float) -> tuple[Tensor, Tensor]:
    """The support of each row of weights [batch, head, row, key] and the number of weights above; 0 of empty rows."""
    size = weights.double().abs().cpu()
    total = size.sum(-1, keepdim=True)
    held = size.sort(-1, descending=True).values.cumsum(-1)
    # the last key that is needed is the first at which the sum is reached
    least = (held < share * total * (1 - 1e-12)).sum(-1) + 1
    return least.double() * (total[..., 0] > 0), (size > above).double().sum(-1)
