"""What every edit is: a small frozen dataclass, data and never a callback, that says how it lowers in one layer.

`Edit` gives JSON, Python source and equality; `HeadWise` what edits with `heads`, `layers` and `rows` share;
`Prepared` is an edit made ready for one model. A new edit is a subclass with `_lower`, imported in `edits/__init__.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context
from headwater.lens.attention.context import ActiveEdit, Lowered
from headwater.lens.attention.module_hooks import After, Before, on
from headwater.lens.edits.named_positions import NO_GROUPS, Names
from headwater.lens.errors import EditError
from headwater.lens.models.opened import Opened
from headwater.lens.naming import heads as naming, positions
from headwater.lens.naming.heads import Head, Heads, Layers
from headwater.lens.naming.positions import Positions
from headwater.lens.naming.tokens import Tokens
from headwater.lens.running.ids import enter, reading

Rows = str | int | Iterable[int]
LIMITS = ("queries", "where", "rows")


@dataclass(frozen=True, eq=False)
class Edit:
    """Base of all edits. Two edits are equal when their JSON is."""

    own_position: ClassVar[bool] = False  # whether it means a query's own position among the keys
    renamed: ClassVar[Mapping[str, str]] = {}  # fields by the names that older files call them

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        """Check the edit against a model and fetch what it needs from it; `groups` are names of positions."""
        raise TypeError(f"{type(self).__name__} is not an edit that can be applied")

    def _lower(self, call: LayerCall) -> Lowered:
        """What the edit comes to in one layer's call."""
        return Lowered()

    def named_positions(self) -> list[Positions]:
        """The positions the edit names, so that a prompt which lacks them is refused."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `edit_from_dict` reads it back. Limits to some rows stand there only where they are set."""
        found = {"edit": type(self).__name__}
        for field in dataclasses.fields(self):
            value = self._plain(field.name)
            if field.name not in LIMITS or value != field.default:
                found[field.name] = value
        return found

    def to_python(self) -> str:
        """The edit as a line of Python, with `hw` for `headwater`; settings at their default are left out."""
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
    """One layer's call as an edit sees it: which heads it is to act on, bool [batch|1, head], and where rows stand."""

    layer: int
    heads: Tensor
    mask: Mask
    batch: int
    values: Any
    names: Names
    sink_head: int = 0

    def queries(self, given: Positions) -> Tensor:
        """The rows that positions name, bool [batch|1, query]."""
        return self.names.select(given, self.mask, "query", self.layer, self.sink_head)

    def keys(self, given: Positions) -> Tensor:
        """The columns that positions name, bool [batch|1, key]."""
        return self.names.select(given, self.mask, "key", self.layer, self.sink_head)

    def rows(self, given: Positions) -> Tensor | None:
        """As weight edits take them, bool [batch|1, 1, query]; None for all."""
        return None if isinstance(given, str) and given == "all" else self.queries(given)[:, None]


class ModuleHook(NamedTuple):
    """What an edit does at a module of the model while it is on, as `module_hooks.on` takes it."""

    module: nn.Module
    before: Before | None = None
    after: After | None = None


@dataclass(frozen=True, eq=False)
class Prepared(ActiveEdit):
    """An edit made ready for one model: its head masks by layer, bool [head], and what it lowers to there."""

    edit: Edit
    heads: Mapping[int, Tensor]
    names: Names
    values: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    rows: tuple[int, ...] | None = None
    hooks: tuple[ModuleHook, ...] = ()

    @property
    def user_edit(self) -> Edit:
        return self.edit

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
        # sinks differ from head to head: heads that share them are edited together
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
        return joined(parts)

    def sink_rules(self) -> list[str]:
        plain_forms = [positions.check(p, "positions") for p in self.edit.named_positions()]
        return list(dict.fromkeys(name for p in plain_forms for name in self.names.sink_names(p)))

    def of_rows(self, heads: Tensor, batch: int) -> Tensor:
        """The head mask of the batch rows the edit acts on, bool [batch|1, head]."""
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
    """What the edits that take `heads`, `layers` and `rows` share; at its neutral value an edit touches nothing.

    It is no dataclass, so that each edit has these fields in an order of its own.
    """

    heads: Heads
    layers: Layers
    rows: Rows

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        self._check()
        names = Names(model, groups)
        for given in self.named_positions():
            names.check(given, f"{type(self).__name__}: positions")
        heads = naming.chosen(self.heads, self.layers, model.layers, model.n_heads)
        rows = batch_rows(self.rows, type(self).__name__)
        return Prepared(self, {} if self._is_neutral() else heads, names, rows=rows)

    def _places(self) -> dict[str, Positions]:
        """The queries and keys that the edit acts on, by the name of the field."""
        names = [field.name for field in dataclasses.fields(self) if field.name in ("queries", "keys")]
        return {name: getattr(self, name) for name in names}

    def named_positions(self) -> list[Positions]:
        return list(self._places().values())

    def _check(self) -> None:
        for name, given in self._places().items():
            positions.check(given, f"{type(self).__name__}: {name}")

    def _is_neutral(self) -> bool:
        return () in (positions.check(given, name) for name, given in self._places().items())

    @abstractmethod
    def _lower(self, call: LayerCall) -> Lowered: ...


@contextlib.contextmanager
def applied(model: Opened, prepared: Sequence[Prepared]) -> Iterator[None]:
    """The edits on, in this context alone; hooks on modules are taken off at the end."""
    with contextlib.ExitStack() as stack:
        if any(p.reads_tokens for p in prepared):
            stack.enter_context(reading(model))
        stack.enter_context(context.editing(model.key, prepared))
        for one in prepared:
            for module, *acts in one.hooks:
                stack.enter_context(on(module, *(_where_on(act, one, model.key) for act in acts)))
        yield


def _where_on(act: Callable[..., Any] | None, prepared: Prepared, key: object) -> Any:
    """The function of a hook, which does nothing in runs that are to be unedited."""
    return act and (lambda *given: act(*given) if prepared in context.active(key) else None)


def joined(parts: Sequence[Lowered]) -> Lowered:
    """Several lowered edits as one."""
    return Lowered(
        tuple(e for part in parts for e in part.scores),
        tuple(e for part in parts for e in part.weights),
        tuple(e for part in parts for e in part.outputs),
        tuple(a for part in parts for a in part.adapters),
        next((part.normaliser for part in parts if part.normaliser is not None), None),
    )


def batch_rows(given: Rows, where: str) -> tuple[int, ...] | None:
    """Rows of the batch as numbers; None for all."""
    if isinstance(given, str) and given == "all":
        return None
    found: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if isinstance(given, str) or not all(isinstance(n, int) and not isinstance(n, bool) for n in found):
        raise EditError(f"{where}: rows are 'all', a batch row or a list of them; got {given!r}")
    return tuple(found)


def number(value: Any, what: str, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within bounds, or an EditError that names it."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise EditError(f"{where}: {what} must be a finite number; got {value!r}")
    if not low <= value <= high:
        bounds = f"between {low:g} and {high:g}" if high < math.inf else f"{low:g} or more"
        raise EditError(f"{where}: {what} must be {bounds}; got {value}")
    return float(value)


def vectors(given: Any, width: int, what: str) -> Tensor:
    """Finite numbers [width], or [position, width], in float32, or an EditError that names them."""
    try:
        array = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=np.float32)
    except (TypeError, ValueError):
        array = np.empty(0)
    shaped = array.ndim in (1, 2) and array.size > 0 and array.shape[-1] == width
    if not shaped or not np.isfinite(array).all():
        got = "NaN or infinite values" if shaped else list(array.shape)
        raise EditError(f"{what} must be {width} finite numbers, or [position, {width}]; got {got}")
    return torch.from_numpy(array.copy())


def overlap(a: Positions, b: Positions) -> list[int | str]:
    """Positions written the same way in both; an overlap that the prompt alone shows is taken out later."""
    first, second = ([p for p in positions.parts(x) if not isinstance(p, slice)] for x in (a, b))
    return [p for p in first if p in second]


def plain(value: Any) -> Any:
    """A value as JSON holds it."""
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
        # said in provenance; whoever reads it back is told that it was in memory
        return {"in_memory": type(value).__name__}
    return value


def read(value: Any) -> Any:
    """What `plain` wrote."""
    if isinstance(value, Mapping) and set(value) == {"slice"}:
        return slice(*value["slice"])
    if isinstance(value, Mapping):
        return {key: read(v) for key, v in value.items()}
    return [read(v) for v in value] if isinstance(value, list | tuple) else value


def _source(value: Any) -> str:
    """Python for a plain value."""
    if isinstance(value, dict) and set(value) == {"slice"}:
        return repr(slice(*value["slice"]))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_source(v)}" for k, v in value.items()) + "}"
    return f"[{', '.join(map(_source, value))}]" if isinstance(value, list) else repr(value)
