"""Dormant heads: heads that rest on a text, because they look at the sink alone or write next to nothing.

A head that looks at the sink may still carry something, and a head that looks elsewhere may write nothing, so both are
told: the weight on the sinks (Guo et al. 2024, active-dormant heads) and the norm of the head's output beside that of
its layer's heads (Sandoval-Segura et al. 2025, arXiv 2504.03889).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses.sinks._sink_keys import (
    KeysSetting,
    RuleSetting,
    ThresholdSetting,
    sink_keys,
    weight_on,
)
from headwater.analyses.sinks._streams import refuse_without_values
from headwater.lens.records.record import Record

RULES = ("attention", "output", "both")


@analysis(keep=("qkv", "residual"))
def dormant_heads(
    record: Record,
    keys: KeysSetting = 0,
    rule: RuleSetting = None,
    threshold: ThresholdSetting = None,
    weight: Annotated[float, "mean weight on the sinks above which a head rests", Bounds(0.0, 1.0)] = 0.8,
    norm: Annotated[float, "share of the layer's mean output norm below which it rests", Bounds(0.0)] = 0.5,
) -> xr.Dataset:
    """`share` [rule] is the share of (text, layer, head) that rest, by "attention", by "output", or by "both".

    `on_sinks` [batch, layer, head] is `Σ_{j in sinks} A_ij` in the mean over the queries that see another key too;
    "attention": it is above `weight`. `relative` [batch, layer, head] is `mean_i ‖z_i‖ / mean_h mean_i ‖z_ih‖` over
    the same queries, with `z_i = Σ_j A_ij v_j` and the mean over the heads of the layer; "output": it is below `norm`.
    `layer_share` [rule, layer] is the share by layer. A text without such queries is NaN and does not count. Both
    thresholds are ours: published ones were chosen model by model. What the output projection does to z is not counted.
    AnalysisError unless the record keeps "qkv".

    Question: How many heads rest on a text?
    Unit: share of (text, layer, head); weight, 0 to 1; ratio of norms.
    Source: Guo et al. 2024, arXiv:2410.13835, and Sandoval-Segura et al. 2025, arXiv:2504.03889, from memory.
    Cost: two attention passes per layer, memory O(S·heads·d_head); a rule adds the cost of find_sinks.
    Not for: pruning: a head that rests here may work on another text, and one that rests may be what a sink is for.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("When Mary and John went to the store", keep=("qkv", "residual"))
    >>> found = hw.analyses.dormant_heads(record)
    >>> found.share.dims, bool(found.share.sel(rule="both") <= found.share.sel(rule="attention"))
    (('rule',), True)
    """
    refuse_without_values(record, "('qkv', 'residual')")
    sinks = sink_keys(record, keys, rule, threshold)
    strength, even = weight_on(record, sinks), weight_on(record, sinks, even=True)
    used = record.valid[:, None, None] & (even < 1 - 1e-6)  # a row that sees only sinks has no choice
    on_sinks = strength.masked_fill(~used, torch.nan).nanmean(-1)
    norms = []
    for place, layer in enumerate(record.layers):
        map = record.map(layer)
        value = record.values[layer].to(map.q.device)
        z = map @ value.repeat_interleave(map.shape[1] // value.shape[1], 1)
        lengths = z.double().norm(dim=-1).cpu().masked_fill(~used[:, place], torch.nan)
        norms.append(lengths.nanmean(-1))
    length = torch.stack(norms, 1)
    relative = length / length.nanmean(-1, keepdim=True)
    rests = torch.stack([on_sinks > weight, relative < norm])
    rests = torch.cat([rests, rests.all(0, keepdim=True)]).double()
    rests = rests.masked_fill((on_sinks.isnan() | relative.isnan())[None], torch.nan)
    dims = ("batch", "layer", "head")
    return xr.Dataset(
        {
            "share": ("rule", rests.nanmean((1, 2, 3)).numpy()),
            "layer_share": (("rule", "layer"), rests.nanmean((1, 3)).numpy()),
            "on_sinks": (dims, on_sinks.numpy()),
            "relative": (dims, relative.numpy()),
        },
        coords={"rule": list(RULES), "layer": record.layers, "head": np.arange(record.n_heads)},
    )
