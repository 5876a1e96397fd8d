"""Coordinates that name every head of a record on one axis of a result."""

from __future__ import annotations

from headwater.lens.naming.heads import every_head
from headwater.lens.records.record import Record


def head_names(record: Record, *dims: str) -> dict[str, object]:
    """Coordinates "layer.head" of all heads of a record on the dimensions `head` and `other`, or those given."""
    heads = every_head(record.layers, record.n_heads)
    named: dict[str, object] = {dim: [str(head) for head in heads] for dim in dims or ("head", "other")}
    first = dims[0] if dims else "head"
    return named | {"layer": (first, [h.layer for h in heads]), "index": (first, [h.head for h in heads])}
