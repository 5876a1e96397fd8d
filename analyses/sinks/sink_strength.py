"""Sink strength: the weight that each query puts on the sinks, layer by layer, head by head, token by token.

One product of each layer's map with the sinks' indicator, so the memory is linear, also on the record of a generation,
whose queries are the prompt's tokens and then the generated ones. Says where attention goes and not what it does there.
"""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses.sinks._sink_keys import KeysSetting, RuleSetting, ThresholdSetting, sink_keys
from headwater.analyses.sinks._uniform_map import even_map
from headwater.lens.records.record import Record


@analysis(keep=("qk", "residual"))
def sink_strength(
    record: Record,
    keys: KeysSetting = 0,
    rule: RuleSetting = None,
    threshold: ThresholdSetting = None,
) -> xr.Dataset:
    """`strength` [batch, layer, head, query] is `Σ_{j in sinks} A_ij`, what query i puts on its head's sinks.

    `even` [batch, layer, head, query] is `#{sinks that i sees} / #{keys that i sees}`, the strength of a head that
    looks at all keys alike. `mean` [part, layer, head] averages over the queries that see a key that is no sink, first
    over those of a text, then over texts; the parts are "all" and, where the record has the group "generated"
    (`model.generate(…, record=True, groups="generated")`), "prompt" and "generated". `generated` [batch, query] says
    which queries those are. Weights count as they are: with learned sinks or another normaliser a row may sum to less.
    ACT's rule is taken with each head's first sink left in. Queries of padding are NaN.
    Unit: weight. Source: ours; the definition is the plain sum.

    Question: How much attention goes to the sinks, over layers, heads and the tokens that look?
    Unit: weight, 0 to 1; even: the weight that a look at all visible keys alike gives.
    Source: ours; first-token sinks as in Gu et al., ICLR 2025, arXiv:2410.10781.
    Cost: two attention passes per layer, memory O(layers·heads·S); a rule adds that of find_sinks.
    Not for: saying that the sinks carry something (sink_contribution does); rows that see little but sinks.
    """
    sinks = sink_keys(record, keys, rule, threshold)
    strength, even = [], []
    for place, layer in enumerate(record.layers):
        map = record.map(layer)
        mine = sinks[:, place]
        flags = mine[..., None].float().to(map.q.device)
        strength.append((map @ flags)[..., 0].double().cpu())
        even.append((even_map(map) @ flags)[..., 0].double().cpu())
    padding = ~record.valid[:, None, None]
    found, level = (torch.stack(x, 1).masked_fill(padding, torch.nan) for x in (strength, even))
    coords = {
        "layer": record.layers,
        "head": np.arange(record.n_heads),
        "token": (("batch", "query"), np.array(record.strings, dtype=object).astype(str)),
    }
    dims = ("batch", "layer", "head", "query")
    result = xr.Dataset({"strength": (dims, found.numpy()), "even": (dims, level.numpy())}, coords=coords)
    use = result.even < 1 - 1e-6  # a row that sees nothing but sinks says nothing; so do rows of padding
    parts = {"all": use}
    if "generated" in record.groups:
        later = xr.DataArray(record.groups["generated"].cpu().numpy(), dims=("batch", "query"))
        result["generated"] = later
        parts |= {"prompt": use & ~later, "generated": use & later}
    means = [result.strength.where(part).mean("query").mean("batch") for part in parts.values()]
    result["mean"] = xr.concat(means, "part").assign_coords(part=list(parts))
    settings = {"keys": keys if rule is None else None}
    return result.assign_attrs(settings)
