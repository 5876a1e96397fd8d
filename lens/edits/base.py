"""The base classes of edits. An edit is a small frozen dataclass, data and never a callback.

Its method `_lower` translates it, for one call of one layer, into the kernels' edits. `Edit` gives JSON, Python source
and equality; `HeadWise` the fields `heads`, `layers` and `rows`; `Prepared` is an edit prepared for one model. A new
edit is a subclass with `_lower`, imported in `edits/__init__.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.context import ActiveEdit, Lowered
from headwater.lens.attention.module_hooks import After, Before
from headwater.lens.edits.named_positions import NO_GROUPS, Names
from headwater.lens.errors import EditError
from headwater.lens.models.opened import Opened
from headwater.lens.naming import heads as naming, positions
from headwater.lens.naming.heads import Head, Heads, Layers
from headwater.lens.naming.positions import Positions
from headwater.lens.naming.tokens import Tokens
from headwater.lens.running.ids import enter

Rows = str | int | Iterable[int]
LIMITS = ("queries", "where", "rows")
MOST_COUNT = 2**31 - 1
ANY, SHARE = (-math.inf, math.inf), (0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Edit:
    """Base of all edits. Two edits are equal when their JSON is."""

    own_position: ClassVar[bool] = False  # whether it needs the query's own position among the keys
    row_sums: ClassVar[str] = (
        ""  # what it does to the sums of rows, where these are no longer what the softmax gave
    )
    shortens: ClassVar[bool] = False  # whether all it does is to take tokens out of the sequence
    renamed: ClassVar[Mapping[str, str]] = {}  # {field name in older files: field name now}

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        """Check the edit for a model and compute what depends on the model; `groups` are named positions."""
        raise TypeError(f"{type(self).__name__} is not an edit that can be applied")

    def _lower(self, call: LayerCall) -> Lowered:
        """The edit in one call of a layer, as the kernels take it."""
        return Lowered()

    def named_positions(self) -> list[Positions]:
        """All positions in the edit, so that a prompt without them can be refused."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The edit as JSON data, for `edit_from_dict`; `queries`, `where` and `rows` only if not default."""
        found = {"edit": type(self).__name__}
        for field in dataclasses.fields(self):
            value = self._plain(field.name)
            if field.name not in LIMITS or value != field.default:
                found[field.name] = value
        return found

    def to_python(self) -> str:
        """The edit as a line of Python, with `import headwater as hw`; default settings are left out."""
        shown = []
        for field in dataclasses.fields(self):
            value = self._plain(field.name)
            default = None if field.default is dataclasses.MISSING else plain(field.default)
            if field.default is dataclasses.MISSING or value != default or type(value) is not type(default):
                given = getattr(self, field.name)
                shown.append(f"{field.name}={given if isinstance(given, slice) else _source(value)}")
        return f"hw.{type(self).__name__}({', '.join(shown)})"

    def _plain(self, field: str) -> Any:
        value = getattr(self, field)
        return naming.as_data(value) if field == "heads" and not isinstance(value, str) else plain(value)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.to_dict() == other.to_dict()  # type: ignore[union-attr]

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer, as `_lower` gets it.

    `heads` are the heads to edit, bool [batch|1, head]; `values` is what `prepare` stored for the layer; names of sinks
    mean the sinks of `sink_head`.
    """

    layer: int
    heads: Tensor
    mask: Mask
    batch: int
    values: Any
    names: Names
    sink_head: int = 0

    def queries(self, given: Positions) -> Tensor:
        """The positions as rows of the map, bool [batch|1, query]."""
        return self.names.select(given, self.mask, "query", self.layer, self.sink_head)

    def keys(self, given: Positions) -> Tensor:
        """The positions as columns of the map, bool [batch|1, key]."""
        return self.names.select(given, self.mask, "key", self.layer, self.sink_head)

    def rows(self, given: Positions) -> Tensor | None:
        """The positions as rows for weight edits, bool [batch|1, 1, query]; None for all."""
        return None if isinstance(given, str) and given == "all" else self.queries(given)[:, None]


class ModuleHook(NamedTuple):
    """A forward hook that an edit needs while it is on; the fields are the arguments of `module_hooks.on`."""

    module: nn.Module
    before: Before | None = None
    after: After | None = None
    early: bool = False


@dataclass(frozen=True, eq=False)
class Prepared(ActiveEdit):
    """An edit prepared for one model.

    `heads` gives the edited heads by layer, bool [head]; `values` what the edit computed for a layer; `rows` the batch
    rows (None: all); `hooks` the module hooks that are on with the edit.
    """

    edit: Edit
    heads: Mapping[int, Tensor]
    names: Names
    values: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    rows: tuple[int, ...] | None = None
    hooks: tuple[ModuleHook, ...] = ()

    @property
    def user_edit(self) -> Edit:
        return self.edit

    @property
    def shortens(self) -> bool:
        return self.edit.shortens

    @cached_property
    def reads_tokens(self) -> bool:
        named = [
            n for p in self.edit.named_positions() for n in positions.named(positions.check(p, "positions"))
        ]
        return bool(named) or getattr(self.edit, "reads_tokens", False)

    def lower(self, layer: int, mask: Mask, batch: int) -> Lowered:
        if self.reads_tokens and layer == self.names.model.layers[0]:
            enter(self.names.model.key, mask)
        if layer not in self.heads:
            return Lowered()
        heads = self.of_rows(self.heads[layer], batch)
        call = LayerCall(layer, heads, mask, batch, self.values.get(layer), self.names)
        rules = self.sink_rules()
        if not rules:
            return self.edit._lower(call)
        # heads have different sinks: heads with the same sinks are lowered together
        found = torch.stack([self.names.sinks_of(rule, mask, layer) for rule in rules])
        alike: dict[bytes, list[int]] = {}
        for head in self.heads[layer].nonzero()[:, 0].tolist():
            alike.setdefault(found[:, :, head].numpy().tobytes(), []).append(head)
        parts = []
        for members in alike.values():
            some = torch.zeros_like(heads)
            some[:, members] = heads[:, members]
            at = dataclasses.replace(call, heads=some, sink_head=members[0])
            parts.append(self.edit._lower(at))
        return Lowered.joined(parts)

    def sink_rules(self) -> list[str]:
        plain_forms = [positions.check(p, "positions") for p in self.edit.named_positions()]
        return list(dict.fromkeys(name for p in plain_forms for name in self.names.sink_names(p)))

    def of_rows(self, heads: Tensor, batch: int) -> Tensor:
        """The edited heads in each batch row, bool [batch|1, head]."""
        if self.rows is None:
            return heads[None]
        wrong = [row for row in self.rows if not -batch <= row < batch]
        if wrong:
            raise EditError(
                f"{type(self.edit).__name__}: no batch row {wrong[0]} in a batch of {batch}; rows go from "
                f"0 to {batch - 1}"
            )
        acts = torch.zeros(batch, 1, dtype=torch.bool)
        acts[list(self.rows)] = True
        return acts & heads[None]

    def check_prompt(self, tokens: Tokens, longest: int, more: int) -> None:
        for named in self.edit.named_positions():
            plain_form = positions.check(named, "positions")
            if wrong := positions.beyond(plain_form, longest):
                raise EditError(
                    f"{type(self.edit).__name__}: no position {wrong[0]} in a prompt of {longest} tokens; "
                    f"positions go from 0 to {longest - 1}, or from -1 back to {-longest}"
                )
            if not more and (name := self.names.missing(plain_form, tokens)) is not None:
                raise EditError(
                    f"{type(self.edit).__name__}: no token of the prompt is {name!r}; model.to_strings "
                    "shows its tokens"
                )


class HeadWise(Edit, ABC):
    """Base of the edits with the fields `heads`, `layers` and `rows`. A neutral edit is prepared without heads.

    It is not a dataclass, so that each edit can declare these fields in its own order.
    """

    numbers: ClassVar[
        Mapping[str, tuple[float, float]]
    ] = {}  # finite numbers, and from where to where they go
    counts: ClassVar[Mapping[str, int]] = {}  # whole numbers, and the least
    neutral: ClassVar[Mapping[str, Any]] = {}  # values at which the edit changes nothing
    heads: Heads
    layers: Layers
    rows: Rows

    def __init_subclass__(cls, **limits: Mapping[str, Any]) -> None:
        """`numbers`, `counts` and `neutral` of the edit's own."""
        super().__init_subclass__()
        for name, given in limits.items():
            setattr(cls, name, given)

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        self._check()
        names = Names(model, groups)
        for given in self.named_positions():
            names.check(given, f"{type(self).__name__}: positions")
        heads = naming.chosen(self.heads, self.layers, model.layers, model.n_heads)
        rows = batch_rows(self.rows, type(self).__name__)
        return Prepared(self, {} if self._is_neutral() else heads, names, rows=rows)

    def _places(self) -> dict[str, Positions]:
        """The fields `queries` and `keys` by name, as far as the edit has them."""
        names = [field.name for field in dataclasses.fields(self) if field.name in ("queries", "keys")]
        return {name: getattr(self, name) for name in names}

    def named_positions(self) -> list[Positions]:
        return list(self._places().values())

    def _check(self) -> None:
        where = type(self).__name__
        for name, given in self._places().items():
            positions.check(given, f"{where}: {name}")
        for name, bounds in self.numbers.items():
            number(getattr(self, name), name, where, *bounds)
        for name, least in self.counts.items():
            value = getattr(self, name)
            if value is None and name in self.neutral:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise EditError(f"{where}: {name} must be a whole number, {least} or more; got {value!r:.60}")
            if value > MOST_COUNT:
                raise EditError(f"{where}: {name} is at most {MOST_COUNT}; got {value!s:.20}")

    def _is_neutral(self) -> bool:
        if any(getattr(self, name) == value for name, value in self.neutral.items()):
            return True
        return () in (positions.check(given, name) for name, given in self._places().items())

    @abstractmethod
    def _lower(self, call: LayerCall) -> Lowered: ...


def starts(mask: Mask) -> Tensor:
    """The absolute positions of the first real query and the first real key of each batch row, int64 [2, batch|1]."""
    return torch.stack(torch.broadcast_tensors(mask.real("query")[0], mask.real("key")[0]))


def batch_rows(given: Rows, where: str) -> tuple[int, ...] | None:
    """The `rows` of an edit as numbers; None for all."""
    if isinstance(given, str) and given == "all":
        return None
    found: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if isinstance(given, str) or not all(isinstance(n, int) and not isinstance(n, bool) for n in found):
        raise EditError(f"{where}: rows are 'all', a batch row or a list of them; got {given!r}")
    return tuple(found)


def number(value: Any, what: str, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    """The value as a float; EditError unless it is a finite number within the bounds."""
    whole = isinstance(value, int) and abs(value) > sys.float_info.max  # a file can hold such numbers
    if whole or isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise EditError(f"{where}: {what} must be a finite number; got {value!r:.60}")
    if not math.isfinite(value):
        raise EditError(f"{where}: {what} must be a finite number; got {value!r}")
    if not low <= value <= high:
        bounds = f"between {low:g} and {high:g}" if high < math.inf else f"{low:g} or more"
        raise EditError(f"{where}: {what} must be {bounds}; got {value}")
    return float(value)


def singles(given: Any) -> np.ndarray:
    """The numbers as float32; what is too large for it is infinite. TypeError or ValueError for what can not be one."""
    try:
        with np.errstate(over="ignore"):
            return np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=np.float32)
    except OverflowError:
        raise ValueError("a whole number is too large") from None


def vectors(given: Any, width: int, what: str) -> Tensor:
    """The numbers as float32, [width] or [position, width]; EditError for another shape, NaN or infinity."""
    try:
        array = singles(given)
    except (TypeError, ValueError):
        array = np.empty(0)
    shaped = array.ndim in (1, 2) and array.size > 0 and array.shape[-1] == width
    if not shaped or not np.isfinite(array).all():
        got = "NaN or infinite values" if shaped else list(array.shape)
        raise EditError(f"{what} must be {width} finite numbers, or [position, {width}]; got {got}")
    return torch.from_numpy(array.copy())


def overlap(a: Positions, b: Positions) -> list[int | str]:
    """The positions that stand in both; an overlap that only a prompt shows is resolved in `_lower`."""
    first, second = ([p for p in positions.parts(x) if not isinstance(p, slice)] for x in (a, b))
    return [p for p in first if p in second]


def plain(value: Any) -> Any:
    """A value as JSON data."""
    if isinstance(value, Head):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, xr.DataArray):
        return value.values.tolist()
    if isinstance(value, Sequence | range) and not isinstance(value, str):
        return [plain(v) for v in value]
    if value is not None and not isinstance(value, str | int | float | bool):
        # a record in memory: provenance can name its type, and reading the edit back raises EditError
        return {"in_memory": type(value).__name__}
    return value


def read(value: Any) -> Any:
    """The value of which `plain` gave this JSON data; sequences become lists."""
    if isinstance(value, Mapping) and set(value) == {"slice"}:
        if not isinstance(value["slice"], list | tuple) or len(value["slice"]) != 3:
            raise EditError(f"a slice is a list of start, stop and step; got {value['slice']!r:.60}")
        return slice(*value["slice"])
    if isinstance(value, Mapping):
        return {key: read(v) for key, v in value.items()}
    return [read(v) for v in value] if isinstance(value, list | tuple) else value


def _source(value: Any) -> str:
    """Python source of JSON data."""
    if isinstance(value, dict) and set(value) == {"slice"}:
        return repr(slice(*value["slice"]))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_source(v)}" for k, v in value.items()) + "}"
    return f"[{', '.join(map(_source, value))}]" if isinstance(value, list) else repr(value)
