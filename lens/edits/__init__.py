"""Edits of attention, of heads and of the residual stream, as a user writes them: small frozen dataclasses, pure data.

In a layer, edits of scores (`scores.py`) act first, then edits of weights (`weights.py`, `patterns.py`), then edits of
head outputs z before the output projection (`heads.py`), whatever their order. Edits of the same kind act in the given
order. `residual.py` edits the residual stream and the MLP, `at_steps.py`
limits an edit to steps of a diffusion model. An edit at its neutral value changes nothing, bit for bit.
`naming/heads.py` and `naming/positions.py` say how heads and positions are written; `rows` limits an edit to some rows
of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from headwater.lens.edits import (
    at_steps,
    eviction,
    head_mix,
    heads,
    massive,
    order_free,
    pair_masks,
    patterns,
    prune_tokens,
    residual,
    scores,
    weights,
)
from headwater.lens.edits.at_steps import *
from headwater.lens.edits.base import Edit as Edit, read
from headwater.lens.edits.eviction import *
from headwater.lens.edits.head_mix import *
from headwater.lens.edits.heads import *
from headwater.lens.edits.massive import *
from headwater.lens.edits.order_free import *
from headwater.lens.edits.pair_masks import *
from headwater.lens.edits.patterns import *
from headwater.lens.edits.prune_tokens import *
from headwater.lens.edits.residual import *
from headwater.lens.edits.scores import *
from headwater.lens.edits.weights import *
from headwater.lens.errors import EditError, nearest

__all__ = ["edit_from_dict"]
__all__ += at_steps.__all__
__all__ += eviction.__all__
__all__ += head_mix.__all__
__all__ += heads.__all__
__all__ += massive.__all__
__all__ += order_free.__all__
__all__ += pair_masks.__all__
__all__ += patterns.__all__
__all__ += prune_tokens.__all__
__all__ += residual.__all__
__all__ += scores.__all__
__all__ += weights.__all__

# every edit by its name; each file lists its own in `__all__`
EDITS: dict[str, type[Edit]] = {name: globals()[name] for name in __all__[1:]}


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
    return kind(**{key: _read(value) for key, value in data.items() if key != "edit"})


def _read(value: Any) -> Any:
    """The value of a setting, which may be an edit itself."""
    return edit_from_dict(value) if isinstance(value, Mapping) and "edit" in value else read(value)
