"""The keys that an analysis treats as sinks, given by position or found by a rule of `find_sinks`, and their weight."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.positions import Positions, columns_of
from headwater.analyses.sinks._uniform_map import even_map
from headwater.analyses.sinks.find_sinks import Rule, find_sinks
from headwater.lens.records.record import Record

KeysSetting = Annotated[Positions, "the sinks, counted in real tokens of each text; 0 is the first"]
RuleSetting = Annotated[Rule | None, "find the sinks by this rule of find_sinks instead, for each head"]
ThresholdSetting = Annotated[float | None, "threshold of the rule; none: the rule's own", Bounds(0.0)]


def sink_keys(
    record: Record, keys: Positions, rule: Rule | None, threshold: float | None, drop_first: bool = False
) -> Tensor:  # fmt: skip
    """The sinks of each head, bool [batch, layer, head, key]; padding is never a sink.

    A rule runs with its default settings and this threshold. ACT's first sinks stay in unless `drop_first`.
    """
    valid = record.key_axis.valid
    batch, length = valid.shape
    shape = (batch, len(record.layers), record.n_heads, length)
    if rule is None:
        picked = torch.zeros_like(valid).scatter_(1, columns_of(keys, valid, "keys"), True)
        return (picked & valid)[:, None, None].expand(shape)
    found = find_sinks(record, rule=rule, threshold=threshold, drop_first=drop_first).sink
    if "head" not in found.dims:
        found = found.expand_dims(head=record.n_heads)
    return torch.from_numpy(found.transpose("batch", "layer", "head", "key").values.copy())


def weight_on(record: Record, keys: Tensor, even: bool = False) -> Tensor:
    """The weight of each query on its head's `keys` (bool [batch, layer, head, key]), [batch, layer, head, query].

    In float64. With `even`, the weight that uniform attention would put there.
    """
    found = []
    for place, layer in enumerate(record.layers):
        map = even_map(record.map(layer)) if even else record.map(layer)
        flags = keys[:, place, ..., None].float().to(map.q.device)
        found.append((map @ flags)[..., 0].double().cpu())
    return torch.stack(found, 1)
