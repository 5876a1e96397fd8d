"""Sink norms: the norms of the values, keys and hidden states of sinks and of other tokens.

Gu et al., ICLR 2025 (arXiv 2410.10781): first tokens have large hidden states, small values, and keys in the direction
of most queries. Linear memory: products with a uniform map give the mean cosine over all visible pairs.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._prompts.positions import Positions
from headwater.analyses.sinks._sink_keys import sink_keys
from headwater.analyses.sinks._streams import refuse_without_values
from headwater.analyses.sinks._uniform_map import even_map
from headwater.lens.records.record import Record

OF = ("sinks", "others")


@analysis(keep=("qkv", "residual"), maps="square")
def sink_norms(
    record: Record,
    keys: Annotated[Positions, "the sinks, counted in real tokens of each text; 0 is the first"] = 0,
) -> xr.Dataset:
    """Mean l2 norms over the sinks of a text and over its other tokens: `of` = "sinks", "others".

    `hidden` [batch, layer, of]: the residual stream at the input of the layer. `key`, `value` [batch, layer, head, of]:
    keys after the rotation by position, and values; heads that share a key–value head have the same numbers. `cosine`
    [batch, layer, head, of]: the mean of `cos(q_i, k_j)` over all pairs in which query i sees key j, with j a sink or
    another token; score biases are left out. If every token is a sink, "others" is NaN. AnalysisError unless the record
    was made with `keep=("qkv", "residual")`.

    Question: Are the values, keys and hidden states of sinks shorter or longer than those of other tokens?
    Unit: l2 norm of a vector; cosine, -1 to 1.
    Source: Gu et al., ICLR 2025, arXiv:2410.10781; held to the authors' measures, the cosine of "others" is ours.
    Cost: two attention passes per layer, memory O(S·heads·d_head); the record keeps values and the residual stream.
    Not for: saying what a sink carries: a short value under a weight near 1 may outweigh the rest
    (sink_contribution).

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> record = model.record("When Mary and John went to the store", keep=("qkv", "residual"))
    >>> found = hw.analyses.sink_norms(record)
    >>> found.value.shape, bool(found.hidden.sel(layer=1, of="sinks") > found.hidden.sel(layer=1, of="others"))
    ((1, 4, 8, 2), True)
    """
    refuse_without_values(record, "('qkv', 'residual')")
    record.residual(record.layers[0])  # raises if the record did not keep it
    sink = sink_keys(record, keys, None, None)[:, 0, 0]
    kinds = torch.stack([sink, record.valid & ~sink], -1).double()  # [batch, key, of]
    found: dict[str, list[Tensor]] = {name: [] for name in ("hidden", "key", "value", "cosine")}
    for layer in record.layers:
        map = record.map(layer)
        group = map.shape[1] // map.k.shape[1]
        found["hidden"].append(_means(record.residual(layer).double().norm(dim=-1).cpu(), kinds))
        for name, vectors in (("key", map.k), ("value", record.values[layer])):
            lengths = vectors.double().norm(dim=-1).cpu()
            repeats = map.shape[1] // lengths.shape[1]
            found[name].append(_means(lengths, kinds[:, None]).repeat_interleave(repeats, 1))
        even, counts = even_map(map), map.rule.mask.visible_keys(*map.shape[:2]).to(map.q.device)
        unit_keys = torch.nn.functional.normalize(map.k.float(), dim=-1).repeat_interleave(group, 1)
        unit_queries = torch.nn.functional.normalize(map.q.float(), dim=-1)
        cosines = []
        for flags in kinds.float().to(map.q.device).unbind(-1):
            # rows of the uniform map are 1/count, so this sums the keys of the kind that are seen, and counts them
            picked = torch.cat([unit_keys, torch.ones_like(unit_keys[..., :1])], -1) * flags[:, None, :, None]
            seen = (even @ picked) * counts[..., None]
            along = (seen[..., :-1] * unit_queries).sum(-1).double().sum(-1)
            cosines.append((along / seen[..., -1].double().sum(-1)).cpu())
        found["cosine"].append(torch.stack(cosines, -1))
    dims = {name: ("batch", "layer", *(() if name == "hidden" else ("head",)), "of") for name in found}
    return xr.Dataset(
        {name: (dims[name], torch.stack(values, 1).numpy()) for name, values in found.items()},
        coords={"layer": record.layers, "head": np.arange(record.n_heads), "of": list(OF)},
    )


def _means(lengths: Tensor, kinds: Tensor) -> Tensor:
    """Means of lengths [..., key] over the keys of each kind [..., key, of] → [..., of]; NaN without keys."""
    return (lengths[..., None] * kinds).sum(-2) / kinds.sum(-2)
