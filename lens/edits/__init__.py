"""Edits of attention, of heads and of the residual stream, as a user writes them: small frozen dataclasses, pure data.

In a layer, edits of scores (`scores.py`) act first, then edits of weights (`weights.py`, `patterns.py`), then edits of
head outputs z before the output projection (`heads.py`), whatever their order. Edits of the same kind act in the given
order. `residual.py` edits the residual stream and the MLP. An edit at its neutral value changes nothing, bit
for bit. `naming/heads.py` and `naming/positions.py` say how heads and positions are written; `rows` limits an edit to
some rows of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from headwater.lens.edits.base import Edit as Edit, read
from headwater.lens.edits.eviction import HeavyHitters as HeavyHitters
from headwater.lens.edits.heads import (
    AblateHeads as AblateHeads,
    OffsetHeads as OffsetHeads,
    ScaleHeads as ScaleHeads,
)
from headwater.lens.edits.order_free import PositionInvariant as PositionInvariant
from headwater.lens.edits.patterns import (
    FreezeAttention as FreezeAttention,
    InjectPattern as InjectPattern,
    TowardUniform as TowardUniform,
)
from headwater.lens.edits.residual import EditMLP as EditMLP, EditResidual as EditResidual
from headwater.lens.edits.scores import (
    BiasKeys as BiasKeys,
    Emphasise as Emphasise,
    GroupedAttention as GroupedAttention,
    Knockout as Knockout,
    StreamingWindow as StreamingWindow,
    Temperature as Temperature,
)
from headwater.lens.edits.weights import (
    MoveAttention as MoveAttention,
    Normaliser as Normaliser,
    Redistribute as Redistribute,
    TowardIdentity as TowardIdentity,
)
from headwater.lens.errors import EditError, nearest

# every edit class imported above; headwater/__init__.pyi lists the ones that users see as `headwater.NAME`
EDITS: dict[str, type[Edit]] = {
    name: kind
    for name, kind in dict(globals()).items()
    if isinstance(kind, type) and issubclass(kind, Edit) and kind is not Edit
}


def edit_from_dict(data: Mapping[str, Any]) -> Edit:
    """The edit of which `Edit.to_dict` gave this dict; EditError suggests the nearest name for an unknown one.

    >>> import headwater as hw
    >>> edit = hw.Knockout(queries=-1, keys="token:Mary", layers=2)
    >>> hw.edit_from_dict(edit.to_dict()) == edit
    True
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("edit"), str):
        raise EditError(
            f"an edit is an object with the field 'edit', one of {', '.join(EDITS)}; got {data!r}"
        )
    name = data["edit"]
    if name not in EDITS:
        raise EditError(f"unknown edit {name!r}: {nearest(name, EDITS)}")
    kind = EDITS[name]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    data = {
        new if (new := kind.renamed.get(key, key)) not in data else key: value for key, value in data.items()
    }
    unknown = [key for key in data if key != "edit" and key not in fields]
    if unknown:
        raise EditError(f"{name} has no setting {unknown[0]!r}: {nearest(str(unknown[0]), fields)}")
    missing = [n for n, f in fields.items() if n not in data and f.default is dataclasses.MISSING]
    if missing:
        raise EditError(f"{name} needs {', '.join(missing)}")
    return kind(**{key: read(value) for key, value in data.items() if key != "edit"})
