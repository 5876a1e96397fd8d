"""Edits of attention, of heads and of the residual stream, as a user writes them: small frozen dataclasses, pure data.

An edit acts at one of three places of a layer, in this order whatever order the edits are given in: scores
(`scores.py`), weights (`weights.py`, `patterns.py`), a head's output before the output projection (`heads.py`); edits
of the same place act in the order given. The residual stream and the MLP are edited where they stand (`residual.py`).
Every edit at its neutral value leaves the run as it is, bit for bit. `naming/heads.py` says how heads are named,
`naming/positions.py` how positions are; `rows` limits an edit to some rows of the batch.
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

# every edit that is imported here; a user meets it under `headwater` by its line in headwater/__init__.pyi
EDITS: dict[str, type[Edit]] = {
    name: kind
    for name, kind in dict(globals()).items()
    if isinstance(kind, type) and issubclass(kind, Edit) and kind is not Edit
}


def edit_from_dict(data: Mapping[str, Any]) -> Edit:
    """Read back what `Edit.to_dict` gave; every unknown name is an EditError that offers the nearest.

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
