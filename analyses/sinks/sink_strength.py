"""Sink strength: the weight that each query of each head puts on the sinks.

One product of each layer's map with an indicator of the sinks, in linear memory. The record of a generation works too:
its queries are the tokens of the prompt and then the generated tokens. It shows where attention goes, not its effect.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses.sinks._sink_keys import (
    KeysSetting,
    RuleSetting,
    ThresholdSetting,
    sink_keys,
    weight_on,
)
from headwater.lens.records.record import Record


@analysis(keep=("qk", "residual"))
def sink_strength(
    record: Record,
    keys: KeysSetting = 0,
    rule: RuleSetting = None,
    threshold: ThresholdSetting = None,
) -> xr.Dataset:
    """`strength` [batch, layer, head, query] is `Σ_{j in sinks} A_ij`, the weight of query i on its head's sinks.

    `even` [batch, layer, head, query] is `#{sinks that i sees} / #{keys that i sees}`, the strength of uniform
    attention. `mean` [part, layer, head] averages over the queries that see some key besides sinks, first within a
    text, then over texts. Its parts are "all" and, if the record has the group "generated" (`model.generate(…,
    record=True, groups="generated")`), "prompt" and "generated"; `generated` [batch, query] marks these queries.
    Rows are not renormalised: with learned sinks or another normaliser they may sum to less than 1. The rule "act"
    keeps each head's first sink here. Queries of padding are NaN.

    Question: How much attention goes to the sinks, over layers, heads and the tokens that look?
    Unit: weight, 0 to 1; even: the weight that a look at all visible keys alike gives.
    Source: ours, a plain sum; first-token sinks as in Gu et al., ICLR 2025, arXiv:2410.10781.
    Cost: two attention passes per layer, memory O(layers·heads·S); a rule adds the cost of find_sinks.
    Not for: saying that the sinks carry something (sink_contribution does); rows that see little but sinks.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("When Mary and John went to the store , John gave a drink to")
    >>> found = hw.analyses.sink_strength(record)
    >>> found.strength.shape, [round(x, 1) for x in found.even[0, 0, 0, :2].values.tolist()]
    ((1, 4, 8, 15), [1.0, 0.5])
    """
    sinks = sink_keys(record, keys, rule, threshold)
    padding = ~record.valid[:, None, None]
    found, level = (
        weight_on(record, sinks, even).masked_fill(padding, float("nan")) for even in (False, True)
    )
    coords = {
        "layer": record.layers,
        "head": np.arange(record.n_heads),
        "token": (("batch", "query"), np.array(record.strings, dtype=object).astype(str)),
    }
    dims = ("batch", "layer", "head", "query")
    result = xr.Dataset({"strength": (dims, found.numpy()), "even": (dims, level.numpy())}, coords=coords)
    use = result.even < 1 - 1e-6  # leaves out rows that see only sinks, and rows of padding (NaN)
    parts = {"all": use}
    if "generated" in record.groups:
        later = xr.DataArray(record.groups["generated"].cpu().numpy(), dims=("batch", "query"))
        result["generated"] = later
        parts |= {"prompt": use & ~later, "generated": use & later}
    means = [result.strength.where(part).mean("query").mean("batch") for part in parts.values()]
    result["mean"] = xr.concat(means, "part").assign_coords(part=list(parts))
    return result.assign_attrs(keys=keys if rule is None else None)
