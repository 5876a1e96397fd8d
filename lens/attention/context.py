"""What a caller has switched on: edits, gates, listeners, taps and the kernels' backend, in context variables.

A model object is shared by threads, asyncio tasks and dashboard sessions. State on the model would reach all of them; a
`contextvars.ContextVar` reaches only the caller. A new thread starts without any of it. A new task starts with a copy
of what was on, and its later changes stay in the task. The attention function (`function.py`) reads the variables at
every layer.
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

from headwater.kernels.backends.choose import NAMES
from headwater.kernels.edits.outputs import OutputEdit
from headwater.kernels.edits.scores import ScoreEdit
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.errors import ModelError, nearest
from headwater.lens.naming.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Lowered:
    """What the active edits mean in one layer, in the form that the kernels take.

    Of several normalisers the last wins. `adapters` are called with the queries and keys of the layer, after all score
    edits are in the rule.
    """

    scores: tuple[ScoreEdit, ...] = ()
    weights: tuple[WeightEdit, ...] = ()
    outputs: tuple[OutputEdit, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    normaliser: Normaliser | None = None

    @classmethod
    def joined(cls, parts: Sequence[Lowered]) -> Lowered:
        """All parts as one, in their order."""
        return cls(
            tuple(e for part in parts for e in part.scores),
            tuple(e for part in parts for e in part.weights),
            tuple(e for part in parts for e in part.outputs),
            tuple(a for part in parts for a in part.adapters),
            next((part.normaliser for part in reversed(parts) if part.normaliser is not None), None),
        )


class Adapter(Protocol):
    """A function that changes the score rule and the weight edits of one call, given its queries and keys.

    `q` is [batch, head, query, d_head] and `k` [batch, kv head, key, d_head], both after rotary embedding.
    """

    def __call__(
        self, q: Tensor, k: Tensor, rule: ScoreRule, weights: tuple[WeightEdit, ...]
    ) -> tuple[ScoreRule, tuple[WeightEdit, ...]]: ...


class UserEdit(Protocol):
    """An edit as a user wrote it."""

    def to_dict(self) -> dict[str, Any]: ...


class ActiveEdit(ABC):
    """An edit prepared for one model. `shortens` says that all it does is to take tokens out (`shortening.py`)."""

    @property
    def shortens(self) -> bool:
        return False

    @abstractmethod
    def lower(self, layer: int, mask: Mask, batch: int) -> Lowered:
        """What the edit means in one call of a layer with `batch` rows."""

    @property
    def user_edit(self) -> UserEdit | None:
        """The edit that the user wrote; None if an analysis made this one."""
        return None

    @cached_property
    def reads_tokens(self) -> bool:
        """Whether the edit needs the token ids of the prompt that runs (`running/ids.py`)."""
        return False

    def check_prompt(self, tokens: Tokens, longest: int, more: int) -> None:
        """Raise EditError if the prompt lacks a position or token that the edit names.

        `longest` is the length of the longest row, with the `more` tokens that will be generated.
        """
        return  # an edit that an analysis made names no positions

    def sink_rules(self) -> list[str]:
        """The sink names in the edit, such as "sinks:act"; the sinks are found before the prompt runs."""
        return []


class Listener(Protocol):
    """An object whose `take` is called with the attention of every layer while one model runs.

    `take` gets the map, the values [batch, kv head, key, d_value], and z [batch, head, query, d_value] after all edits.
    `statistics` names the statistics it will ask of the map, so that a kernel can compute them in the forward pass.
    The map carries gradients if `grad`.
    """

    model: object
    statistics: tuple[str, ...]
    grad: bool

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None: ...


class Tap:
    """Functions that may replace intermediate values of the attention of one model; this base class changes nothing.

    They are called in this order: `entering` with q, k, v [batch, head, position, d]; `scoring` with the score rule;
    `weighing` with z [batch, head, query, d] as the weights gave it; `leaving` with z after the output edits.
    """

    def entering(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def scoring(self, layer: int, q: Tensor, k: Tensor, rule: ScoreRule) -> ScoreRule:
        return rule

    def weighing(self, layer: int, z: Tensor, map: AttentionMap, v: Tensor) -> Tensor:
        return z

    def leaving(self, layer: int, z: Tensor) -> Tensor:
        return z


# {model key: its `with model.edit(…)` blocks, outermost first}. The mapping is replaced and never changed in place: a
# task that copied the context holds the same object and must keep what it saw.
_edits: ContextVar[Mapping[object, tuple[_Scope, ...]]] = ContextVar(
    "headwater_edits", default=MappingProxyType({})
)
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("headwater_listeners", default=())
_taps: ContextVar[Mapping[object, Tap]] = ContextVar("headwater_taps", default=MappingProxyType({}))
_gates: ContextVar[Mapping[object, Tensor]] = ContextVar("headwater_gates", default=MappingProxyType({}))
_backend: ContextVar[str] = ContextVar("headwater_backend", default="auto")
_discovery: ContextVar[list[tuple[nn.Module, AttentionMap]] | None] = ContextVar(
    "headwater_discovery", default=None
)

NO_TAP = Tap()
# the name of the attention function; transformers treats names that contain "sdpa", "flash" or "flex" specially
NAME = "headwater"


@contextlib.contextmanager
def _set(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        # a generator may be closed in another context, where the token is not valid and the value was never set
        with contextlib.suppress(ValueError):
            variable.reset(token)


@dataclass(eq=False)
class _Scope:
    """The edits of one `with` block.

    Blocks inside generators may end in any order, and in another context than they began in.
    """

    edits: tuple[ActiveEdit, ...]
    ended: bool = False


@contextlib.contextmanager
def editing(model: object, edits: Sequence[ActiveEdit]) -> Iterator[None]:
    """Switch edits of a model on, after the ones that are on already; the end switches off only these."""
    scope = _Scope(tuple(edits))
    current = _edits.get()
    _edits.set({**current, model: (*current.get(model, ()), scope)})
    try:
        yield
    finally:
        scopes = _edits.get().get(model, ())
        # this block began in another context, whose variable can not be changed from here: the flag ends it there
        scope.ended = scope not in scopes
        left = tuple(other for other in scopes if other is not scope and not other.ended)
        others = {key: value for key, value in _edits.get().items() if key is not model}
        _edits.set({**others, model: left} if left else others)


def unedited(model: object):
    """Inside, no edit of this model is on."""
    return _set(_edits, {key: edits for key, edits in _edits.get().items() if key is not model})


@contextlib.contextmanager
def alone(model: object) -> Iterator[None]:
    """Inside, no edits, gates or listeners of this model are on."""
    others = tuple(x for x in _listeners.get() if x.model is not model)
    with unedited(model), _set(_listeners, others), _set(_gates, {}):
        yield


def active(model: object) -> tuple[ActiveEdit, ...]:
    """The edits of a model that are on in this context, in the order in which they act."""
    return tuple(edit for scope in _edits.get().get(model, ()) if not scope.ended for edit in scope.edits)


def user_edits(model: object) -> list[UserEdit]:
    """The active edits that a user wrote, in their original form."""
    return [edit.user_edit for edit in active(model) if edit.user_edit is not None]


def listening(listener: Listener):
    """Inside, the listener gets the attention of every layer of its model."""
    return _set(_listeners, (*_listeners.get(), listener))


def tapping(model: object, tap: Tap):
    """Inside, the tap is called in the attention of the model. It replaces an outer tap."""
    return _set(_taps, {**_taps.get(), model: tap})


def current_tap(model: object) -> Tap:
    """The tap of a model in this context; `NO_TAP` without one."""
    return _taps.get().get(model, NO_TAP)


def only_listeners(model: object) -> bool:
    """Whether nothing that could change the attention of a model, or wants more than a listener gets, is on."""
    return (
        not _edits.get().get(model)
        and model not in _taps.get()
        and model not in _gates.get()
        and _backend.get() == "auto"
        and _discovery.get() is None
    )


def listeners(model: object) -> list[Listener]:
    """The listeners of the model in this context."""
    return [listener for listener in _listeners.get() if listener.model is model]


def hand_over(model: object, layer: int, map: AttentionMap, nothing: Tensor) -> None:
    """Give the listeners the map of a read-only model; `nothing` stands for its unknown values and outputs."""
    for listener in listeners(model):
        listener.take(layer, map, nothing, nothing)


def gated(model: object, gates: Tensor):
    """Inside, z of every head is multiplied by `gates` [batch|1, layer, head], which may require a gradient."""
    return _set(_gates, {**_gates.get(), model: gates})


def current_gates(model: object) -> Tensor | None:
    """The gates of a model in this context."""
    return _gates.get().get(model)


def using(backend: str):
    """Inside, the kernels use the backend of this name; ModelError where there is none."""
    if backend not in NAMES:
        raise ModelError(f"unknown backend {backend!r:.60}: {nearest(backend, NAMES)}")
    return _set(_backend, backend)


def current_backend() -> str:
    """The name of the chosen backend; "auto" without a choice."""
    return _backend.get()


@contextlib.contextmanager
def discovering() -> Iterator[list[tuple[nn.Module, AttentionMap]]]:
    """Collect every attention module that calls the attention function, with its map, in order of the calls."""
    found: list[tuple[nn.Module, AttentionMap]] = []
    with _set(_discovery, found):
        yield found


def discover(module: nn.Module, map: AttentionMap) -> None:
    """Add a call to the list of `discovering`, if one is on."""
    found = _discovery.get()
    if found is not None:
        found.append((module, map))
