"""What a caller has switched on: edits, gates, listeners, taps, and the kernels' backend.

All of it travels in context variables and never on the model: threads, tasks and sessions that share a model can not
see each other's edits. The attention function (`function.py`) reads it at every layer.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor, nn

from headwater.kernels.edits.outputs import OutputEdit
from headwater.kernels.edits.scores import ScoreEdit
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.naming.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Lowered:
    """What the active edits come to in one layer, as the kernels take them.

    The last `normaliser` given wins. `adapters` are for edits that depend on the layer's own queries and keys; they see
    the rule with every score edit.
    """

    scores: tuple[ScoreEdit, ...] = ()
    weights: tuple[WeightEdit, ...] = ()
    outputs: tuple[OutputEdit, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    normaliser: Normaliser | None = None


class Adapter(Protocol):
    """Changes the score rule and the weight edits of one call, knowing its queries and keys.

    `q` is [batch, head, query, d_head], `k` [batch, kv head, key, d_head], both with their positions rotated in.
    """

    def __call__(
        self, q: Tensor, k: Tensor, rule: ScoreRule, weights: tuple[WeightEdit, ...]
    ) -> tuple[ScoreRule, tuple[WeightEdit, ...]]: ...


class UserEdit(Protocol):
    """An edit as a user wrote it."""

    def to_dict(self) -> dict[str, Any]: ...


class ActiveEdit(ABC):
    """An edit made ready for a model."""

    @abstractmethod
    def lower(self, layer: int, mask: Mask, batch: int) -> Lowered:
        """What it comes to in one layer's call, which has `batch` rows."""

    @property
    def user_edit(self) -> UserEdit | None:
        """The user's edit that this was made of; None where an analysis made it."""
        return None

    @cached_property
    def reads_tokens(self) -> bool:
        """Whether the ids of the running prompt are needed."""
        return False

    def check_prompt(self, tokens: Tokens, longest: int, more: int) -> None:
        """Refuse a prompt without what the edit names; its longest row has `longest` tokens, `more` of them to come."""
        return  # one that an analysis made names nothing

    def sink_rules(self) -> list[str]:
        """The rules by which the edit names sinks, to be found before the prompt runs."""
        return []


class Listener(Protocol):
    """Somebody who is handed every layer's attention of one model while it runs.

    `statistics` are the names it will ask every map for: a kernel that has them from the forward pass keeps them.
    """

    model: object
    statistics: tuple[str, ...]

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None: ...


class Tap:
    """Somebody who looks at, and may replace, what one model's attention works with; this one leaves all as it is.

    In their order: q, k, v [batch, head, position, d]; the rule of the scores; z [batch, head, query, d] as the weights
    made it; z as it leaves, after the edits of heads.
    """

    def entering(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def scoring(self, layer: int, q: Tensor, k: Tensor, rule: ScoreRule) -> ScoreRule:
        return rule

    def weighing(self, layer: int, z: Tensor, map: AttentionMap, v: Tensor) -> Tensor:
        return z

    def leaving(self, layer: int, z: Tensor) -> Tensor:
        return z


_edits: ContextVar[Mapping[object, tuple[_Scope, ...]]] = ContextVar(
    "headwater_edits", default=MappingProxyType({})
)
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("headwater_listeners", default=())
_taps: ContextVar[Mapping[object, Tap]] = ContextVar("headwater_taps", default=MappingProxyType({}))
_gates: ContextVar[tuple[object, Tensor] | None] = ContextVar("headwater_gates", default=None)
_backend: ContextVar[str] = ContextVar("headwater_backend", default="auto")
_discovery: ContextVar[list[tuple[nn.Module, AttentionMap]] | None] = ContextVar(
    "headwater_discovery", default=None
)

NO_TAP = Tap()


@contextlib.contextmanager
def _set(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        # a generator may be closed by another thread or task, whose context never had the value
        with contextlib.suppress(ValueError):
            variable.reset(token)


@dataclass(eq=False)
class _Scope:
    """One `with` block and the edits it put on; blocks of generators may end in any order and in any context."""

    edits: tuple[ActiveEdit, ...]
    ended: bool = False


@contextlib.contextmanager
def editing(model: object, edits: Sequence[ActiveEdit]) -> Iterator[None]:
    """Add edits of a model behind those that are on already; only these are taken off at the end."""
    scope = _Scope(tuple(edits))
    current = _edits.get()
    _edits.set({**current, model: (*current.get(model, ()), scope)})
    try:
        yield
    finally:
        scopes = _edits.get().get(model, ())
        # begun in another context, which can not be reached from here: it must not see the edits any longer
        scope.ended = scope not in scopes
        left = tuple(other for other in scopes if other is not scope and not other.ended)
        others = {key: value for key, value in _edits.get().items() if key is not model}
        _edits.set({**others, model: left} if left else others)


def unedited(model: object):
    """Run a model as it is, whatever edits are on around."""
    return _set(_edits, {key: edits for key, edits in _edits.get().items() if key is not model})


@contextlib.contextmanager
def alone(model: object) -> Iterator[None]:
    """Run a model as it is and unheard: no edits, no gates, no listeners of it."""
    others = tuple(x for x in _listeners.get() if x.model is not model)
    with unedited(model), _set(_listeners, others), _set(_gates, None):
        yield


def active(model: object) -> tuple[ActiveEdit, ...]:
    """The edits of a model that are on in this context."""
    return tuple(edit for scope in _edits.get().get(model, ()) if not scope.ended for edit in scope.edits)


def user_edits(model: object) -> list[UserEdit]:
    """The edits that are on, as the user wrote them."""
    return [edit.user_edit for edit in active(model) if edit.user_edit is not None]


def listening(listener: Listener):
    """Hand every layer's attention to the listener."""
    return _set(_listeners, (*_listeners.get(), listener))


def tapping(model: object, tap: Tap):
    """Let a tap look at, and change, what the model's attention works with."""
    return _set(_taps, {**_taps.get(), model: tap})


def current_tap(model: object) -> Tap:
    """The tap on a model's attention in this context."""
    return _taps.get().get(model, NO_TAP)


def listeners(model: object) -> list[Listener]:
    """Who listens to the model in this context."""
    return [listener for listener in _listeners.get() if listener.model is model]


def hand_over(model: object, layer: int, map: AttentionMap, nothing: Tensor) -> None:
    """Give the listeners a map that did not come through `attention`; values and outputs are `nothing`, not seen."""
    for listener in listeners(model):
        listener.take(layer, map, nothing, nothing)


def gated(model: object, gates: Tensor):
    """Multiply every head's output by `gates` [batch|1, layer, head], which may carry a gradient."""
    return _set(_gates, (model, gates))


def current_gates(model: object) -> Tensor | None:
    """The gates on a model's heads that are on in this context."""
    gates = _gates.get()
    return gates[1] if gates is not None and gates[0] is model else None


def using(backend: str):
    """Choose the kernels' backend by name."""
    return _set(_backend, backend)


def current_backend() -> str:
    """The name of the backend that is chosen, "auto" where none is."""
    return _backend.get()


@contextlib.contextmanager
def discovering() -> Iterator[list[tuple[nn.Module, AttentionMap]]]:
    """Collect the attention modules that call in, in their order."""
    found: list[tuple[nn.Module, AttentionMap]] = []
    with _set(_discovery, found):
        yield found


def discover(module: nn.Module, map: AttentionMap) -> None:
    """Tell whoever discovers that a module called in."""
    found = _discovery.get()
    if found is not None:
        found.append((module, map))
