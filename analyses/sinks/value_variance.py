"""Value variance: how far what a head gathers varies over its features, token by token, and the first token's lead.

A query that averages many values gets less variance than one that sees a single value, as the first token of a causal
text does. Li et al. 2026 (arXiv 2605.06611) take this gap for the origin of the sink on the first token.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._prompts.positions import Positions
from headwater.analyses.sinks._sink_keys import sink_keys
from headwater.analyses.sinks._streams import refuse_without_values
from headwater.analyses.sinks._uniform_map import even_map
from headwater.lens.records.record import Record


@analysis(keep=("qkv",), maps="square")
def value_variance(
    record: Record,
    keys: Annotated[Positions, "the sinks, counted in real tokens of each text; 0 is the first"] = 0,
) -> xr.Dataset:
    """`output` [batch, layer, head, position] is the variance over features of `z_i = Σ_j A_ij v_j`.

    `value` [batch, layer, head, position] is that of the token's own value v_i, and `even` [batch, layer, head,
    position] that of the plain mean of the values that i sees: what even attention would gather. Heads that share a
    key–value head share values. `gap` [of, batch, layer, head] is the mean variance at the sinks divided by that at
    the other tokens, of "output", "value" and "even"; NaN where every token is a sink. Variances divide by the number
    of features. Padding and rows that see nothing are NaN. AnalysisError unless the record keeps "qkv".

    Question: Does the first token gather more variance than tokens that average over many?
    Unit: variance over the features of a head's output or value; gap: ratio of means.
    Source: arXiv:2605.06611, after its abstract (the text was not at hand): the measure is ours.
    Cost: two attention passes per layer, memory O(S·heads·d_head).
    Not for: showing that the gap makes the sink: that takes a model trained without it.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("When Mary and John went to the store", keep=("qkv",))
    >>> found = hw.analyses.value_variance(record)
    >>> found.gap.dims, bool(abs(found.output - found.value)[..., 0].max() < 1e-6)  # it sees itself alone
    (('of', 'batch', 'layer', 'head'), True)
    """
    refuse_without_values(record, "('qkv',)")
    sink = sink_keys(record, keys, None, None)[:, :1, :1]
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("output", "value", "even")}
    silent = ~record.valid[:, None]
    for layer in record.layers:
        map = record.map(layer)
        value = record.values[layer].to(map.q.device)
        value = value.repeat_interleave(map.shape[1] // value.shape[1], 1)
        for name, vectors in (("output", map @ value), ("value", value), ("even", even_map(map) @ value)):
            wide = vectors.double()
            spread = (wide - wide.mean(-1, keepdim=True)).square().mean(-1).cpu()
            found[name].append(spread.masked_fill(silent, torch.nan))
    stacked = {name: torch.stack(values, 1) for name, values in found.items()}
    gap = torch.stack(
        [
            values.masked_fill(~sink, torch.nan).nanmean(-1) / values.masked_fill(sink, torch.nan).nanmean(-1)
            for values in stacked.values()
        ]
    )
    dims = ("batch", "layer", "head", "position")
    return xr.Dataset(
        {name: (dims, values.numpy()) for name, values in stacked.items()}
        | {"gap": (("of", *dims[:-1]), gap.numpy())},
        coords={
            "layer": record.layers,
            "head": np.arange(record.n_heads),
            "of": list(stacked),
            "token": (("batch", "position"), np.array(record.strings, dtype=object).astype(str)),
        },
    )
