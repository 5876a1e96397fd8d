"""Axis length = map length = label length: what was recorded must fit the tokens that it is said to be of.

A recorder asks at every layer, and a record is asked as a whole when it is made and when it is opened.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headwater.kernels.maps import statistics as kernel
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.records.contents import Contents
from headwater.lens.records.stacked import Stacked

WHOLE = ("argmax", "visible")  # statistics that are int64


def misfit(
    shape: tuple[int, int, int, int], groups: int,
    statistics: Mapping[str, Tensor], map: AttentionMap | None, value: Tensor | None,
) -> str:  # fmt: skip
    """Why one layer does not fit tokens and heads of `shape` (batch, head, query, key), in words; "" if it does."""
    batch, heads, queries, keys = shape
    if map is not None and map.shape != shape:
        return f"maps of {_said(map.shape)}, not {_said(shape)}"
    shapes = dict.fromkeys(kernel.COLUMN, (batch, heads, keys)) | {"mass": (batch, heads, groups, queries)}
    for name, values in statistics.items():
        wanted = shapes.get(name, (batch, heads, queries))
        if tuple(values.shape) != wanted:
            return f"the statistic {name!r} as {list(values.shape)}, not {list(wanted)}"
        if values.dtype != (torch.int64 if name in WHOLE else torch.float32):
            return f"the statistic {name!r} in {values.dtype}"
    if value is not None and (value.dim() != 4 or (len(value), value.shape[2]) != (batch, keys)):
        return f"values of {list(value.shape)}, for {batch} × {keys} keys"
    return ""


def refuse_misfit(record: Contents) -> None:
    """ValueError where the labels, maps, statistics, groups or streams of a record are not of one length."""
    axes = {"queries": record.query_axis, "keys": record.key_axis}
    for name, axis in axes.items():
        batch, length = axis.tokens.shape
        if axis.valid.shape != axis.tokens.shape:
            raise ValueError(f"{name}: {batch} × {length} tokens, {list(axis.valid.shape)} marks of padding")
        if [len(row) for row in axis.strings] != [length] * batch:
            raise ValueError(f"{name}: {batch} × {length} tokens and another number of labels")
        if len(axis.grids) not in (0, batch) or any(g.end > length for row in axis.grids for g in row):
            raise ValueError(f"{name}: pictures that do not fit {batch} × {length} tokens")
    axes = record.provenance.get("axes", ["text"])
    if not isinstance(axes, list | tuple) or not axes or not all(isinstance(name, str) for name in axes):
        raise ValueError(f"axes named {str(axes)[:40]}")
    (batch, queries), keys = record.tokens.shape, record.key_axis.tokens.shape[1]
    if len(record.key_axis.tokens) != batch:
        raise ValueError(f"{batch} rows of queries and {len(record.key_axis.tokens)} of keys")
    shape = (batch, record.n_heads, queries, keys)
    held = record.statistics
    by_layer = isinstance(held, Stacked)
    for name, values in {} if by_layer else held.items():
        if values.dim() < 2 or values.shape[1] != len(record.layers):
            raise ValueError(
                f"the statistic {name!r} is {list(values.shape)}, for {len(record.layers)} layers"
            )
    for i, layer in enumerate(record.layers):
        # of a tensor of all layers one says what shape they have
        found = held.layer(i) if by_layer else {n: values[:, 0] for n, values in held.items() if i == 0}
        if told := misfit(shape, len(record.groups), found, record.maps.get(layer), record.values.get(layer)):
            raise ValueError(f"layer {layer} has {told}")
    for name, group in record.groups.items():
        if group.shape != (batch, keys) or group.dtype != torch.bool:
            raise ValueError(f"the group {name!r} is {list(group.shape)}, for {batch} × {keys} keys")
    for place, stream in record.residuals.items():
        if stream.dim() != 3 or tuple(stream.shape[:2]) != (batch, queries):
            raise ValueError(f"the stream at {place} is {list(stream.shape)}, for {batch} × {queries} tokens")
    for layer, own in record.effective.items():
        if (len(own.values), own.values.shape[2]) != (batch, queries):
            raise ValueError(
                f"the effective map of layer {layer} is of {list(own.values.shape)}, for {batch} × {queries} tokens"
            )


def _said(shape: tuple[int, int, int, int]) -> str:
    batch, heads, queries, keys = shape
    return f"{batch} × {heads} heads × {queries} queries × {keys} keys"
