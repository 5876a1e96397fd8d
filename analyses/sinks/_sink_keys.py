"""Which keys an analysis takes for sinks: those named by position, or those that a rule of `find_sinks` finds."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.positions import Positions, columns_of
from headwater.analyses.sinks.find_sinks import find_sinks
from headwater.lens.records.record import Record

Found = Literal["share", "gu", "act", "massive", "spectral"]
KeysSetting = Annotated[Positions, "the sinks, counted in real tokens of each text; 0 is the first"]
RuleSetting = Annotated[Found | None, "find the sinks by this rule of find_sinks instead, for each head"]
ThresholdSetting = Annotated[
    float | None, "threshold of the rule; none: the rule's own, see find_sinks", Bounds(0.0)
]


def sink_keys(
    record: Record, keys: Positions, rule: Found | None, threshold: float | None, drop_first: bool = False
) -> Tensor:  # fmt: skip
    """The sinks of each head, bool [batch, layer, head, key]; padding is none.

    A rule is asked with its defaults but for the threshold, and ACT's first sinks are left in unless `drop_first`.
    """
    batch, length = record.valid.shape
    shape = (batch, len(record.layers), record.n_heads, length)
    if rule is None:
        picked = torch.zeros(batch, length, dtype=torch.bool)
        picked.scatter_(1, columns_of(keys, record.valid, "keys"), True)
        return (picked & record.valid)[:, None, None].expand(shape)
    found = find_sinks(record, rule=rule, threshold=threshold, drop_first=drop_first).sink
    if "head" not in found.dims:
        found = found.expand_dims(head=record.n_heads)
    dense = found.transpose("batch", "layer", "head", "key").values.copy()
    return torch.from_numpy(dense).expand(shape)
