"""Edits of attention, of heads and of the residual stream, as a user writes them: small frozen dataclasses, pure data.

An edit acts at one of three places of a layer, in this order whatever order the edits are given in: scores
(`edits_scores.py`), weights (`edits_weights.py`, `edits_patterns.py`), a head's output before the output projection
(`edits_heads.py`); edits of the same place act in the order given. The residual stream and the MLP are edited where
they stand (`edits_residual.py`). Every edit at its neutral value leaves the run as it is, bit for bit. Heads are named
as `heads.py` says, positions as `positions.py` says; `rows` limits an edit to some rows of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from headwater.lens.edits.base import Edit, Prepared, read
from headwater.lens.edits.eviction import HeavyHitters
from headwater.lens.edits.heads import AblateHeads, OffsetHeads, ScaleHeads
from headwater.lens.edits.order_free import PositionInvariant
from headwater.lens.edits.patterns import FreezeAttention, InjectPattern, TowardUniform
from headwater.lens.edits.residual import EditMLP, EditResidual
from headwater.lens.edits.scores import (
    BiasKeys,
    Emphasise,
    GroupedAttention,
    Knockout,
    StreamingWindow,
    Temperature,
)
from headwater.lens.edits.weights import MoveAttention, Normaliser, Redistribute, TowardIdentity
from headwater.lens.errors import EditError, nearest

_ALL: tuple[type[Edit], ...] = (
    Temperature, Knockout, BiasKeys, Emphasise, StreamingWindow, GroupedAttention, HeavyHitters,
    Redistribute, MoveAttention, TowardIdentity, TowardUniform, InjectPattern, FreezeAttention, Normaliser,
    PositionInvariant, ScaleHeads, OffsetHeads, AblateHeads, EditResidual, EditMLP,
)  # fmt: skip
EDITS: dict[str, type[Edit]] = {kind.__name__: kind for kind in _ALL}

__all__ = [
    "EDITS", "AblateHeads", "BiasKeys", "Edit", "EditMLP", "EditResidual", "Emphasise", "FreezeAttention",
    "GroupedAttention", "HeavyHitters", "InjectPattern", "Knockout", "MoveAttention", "Normaliser", "OffsetHeads",
    "PositionInvariant", "Prepared", "Redistribute", "ScaleHeads", "StreamingWindow", "Temperature", "TowardIdentity",
    "TowardUniform", "edit_from_dict",
]  # fmt: skip


def edit_from_dict(data: Mapping[str, Any]) -> Edit:
    """Read back what `Edit.to_dict` gave; every unknown name is an EditError that offers the nearest."""
    if not isinstance(data, Mapping) or not isinstance(data.get("edit"), str):
        raise EditError(
            f"an edit is an object with the field 'edit', one of {', '.join(EDITS)}; got {data!r}"
        )
    name = data["edit"]
    if name not in EDITS:
        raise EditError(f"unknown edit {name!r}: {nearest(name, EDITS)}")
    kind = EDITS[name]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [key for key in data if key != "edit" and key not in fields]
    if unknown:
        raise EditError(f"{name} has no setting {unknown[0]!r}: {nearest(str(unknown[0]), fields)}")
    missing = [n for n, f in fields.items() if n not in data and f.default is dataclasses.MISSING]
    if missing:
        raise EditError(f"{name} needs {', '.join(missing)}")
    return kind(**{key: read(value) for key, value in data.items() if key != "edit"})
