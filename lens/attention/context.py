"""The two functions that transformers calls instead of its own attention and mask, and the context they read.

`register()` enters both under the name "headwater". The mask function returns a description (`LazyMask`), so no
queries × keys mask is built. Which edits are on, and who is listening, travels in context variables and never on the
model: threads, tasks and sessions that share a model can not see each other's edits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from headwater.kernels.attend import attend
from headwater.kernels.edits import Gate, OutputEdit, ScoreEdit, WeightEdit
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.masks import LazyMask, crossing, lazy_mask
from headwater.lens.errors import ModelError
from headwater.lens.models import declared_rules

NAME = "headwater"  # transformers reads meaning into names with "sdpa", "flash" or "flex" in them


class Site(NamedTuple):
    """Where an attention module stands: its part of a model, its layer, and which of the part's layers that is.

    `rows` is the part whose own attention says where the queries stand, itself included; cross-attention needs that.
    """

    model: object
    layer: int
    place: int
    rows: object = None


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


class ActiveEdit(Protocol):
    """An edit made ready for a model; `batch` is how many rows the call has."""

    def lower(self, layer: int, mask: Mask, batch: int) -> Lowered: ...


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


class Staying:
    """A function put on a module that stays behind when the module is copied or pickled: the copy's does nothing."""

    def __init__(self, act: Callable[..., Any] | None = None) -> None:
        self._act = act

    def __call__(self, *given: Any) -> Any:
        return None if self._act is None else self._act(*given)

    def __reduce__(self) -> tuple[type[Staying], tuple[()]]:
        return Staying, ()


_sites: WeakKeyDictionary[nn.Module, Site] = WeakKeyDictionary()
_edits: ContextVar[Mapping[object, tuple[_Block, ...]]] = ContextVar(
    "headwater_edits", default=MappingProxyType({})
)
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("headwater_listeners", default=())
_taps: ContextVar[Mapping[object, Tap]] = ContextVar("headwater_taps", default=MappingProxyType({}))
_gates: ContextVar[tuple[object, Tensor] | None] = ContextVar("headwater_gates", default=None)
_decoder: ContextVar[tuple[object, Mask | None]] = ContextVar("headwater_decoder", default=(None, None))
_backend: ContextVar[str] = ContextVar("headwater_backend", default="auto")
_discovery: ContextVar[list[tuple[nn.Module, AttentionMap]] | None] = ContextVar(
    "headwater_discovery", default=None
)


_NO_TAP = Tap()


@torch.compiler.disable  # a traced call would keep the edits of its first run
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LazyMask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' contract: q, k, v [batch, head, position, d_head] → output [batch, query, head, d_head]."""
    if dropout:
        raise ModelError(
            f"the model is in training mode with attention dropout {dropout}, so attention is random; call model.eval()"
        )
    mask, bias = _mask_of(module, query, key, attention_mask, is_causal)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    site = _sites.get(module)
    layer, tap = (-1, _NO_TAP) if site is None else (site.layer, _taps.get().get(site.model, _NO_TAP))
    query, key, value = tap.entering(layer, query, key, value)
    mask = mask if site is None or site.rows is None else _placed(site, mask)
    edits_on = () if site is None else active(site.model)
    lowered = [edit.lower(site.layer, mask, len(query)) for edit in edits_on] if site is not None else []
    scores = tuple(e for part in lowered for e in part.scores)
    weights = tuple(e for part in lowered for e in part.weights)
    normaliser = next((part.normaliser for part in reversed(lowered) if part.normaliser is not None), None)
    if normaliser is not None and normaliser.name == "softmax":
        normaliser = None
    rule = ScoreRule(float(scale), mask, softcap, s_aux, bias, scores, normaliser=normaliser)
    own = declared_rules.of(module)
    rule = rule if own is None else own.applied(query, rule)
    for adapter in (a for part in lowered for a in part.adapters):
        rule, weights = adapter(query, key, rule, weights)
    rule = tap.scoring(layer, query, key, rule)
    listeners = [x for x in _listeners.get() if site is not None and x.model is site.model]
    wanted = tuple(dict.fromkeys(name for listener in listeners for name in listener.statistics))
    z, map = attend(query, key, value, rule, weights, _backend.get(), wanted)
    z = tap.weighing(layer, z if own is None else own.added(z, map, rule), map, value)
    z = tap.leaving(layer, _outputs(z, site, rule.mask, [e for part in lowered for e in part.outputs]))
    found = _discovery.get()
    if found is not None:
        found.append((module, map))
    if site is not None:
        for listener in listeners:
            listener.take(site.layer, map, value, z)
    return z.transpose(1, 2).contiguous(), None


def _placed(site: Site, mask: Mask) -> Mask:
    """Cross-attention's mask, with the rows' positions and padding; the decoder's own attention came just before."""
    if site.rows is site.model:
        _decoder.set((site.model, mask))
        return mask
    key, own = _decoder.get()
    if key is not site.rows or own is None or own.queries != mask.queries:
        own = Mask(mask.queries, mask.queries)
    return crossing(mask, own)


def _outputs(z: Tensor, site: Site | None, mask: Mask, edits: Sequence[OutputEdit]) -> Tensor:
    """Edits of the heads' outputs in their order, then the differentiable gate."""
    if edits:
        start, _ = mask.real("query")
        positions = torch.arange(mask.queries)[None] + mask.query_offset - start[:, None]
        for edit in edits:
            z = edit.apply(z, positions)
    if site is not None and (gates := current_gates(site.model)) is not None:
        z = Gate(gates[:, site.place]).apply(z, torch.empty(0))
    return z


def _mask_of(
    module: nn.Module, q: Tensor, k: Tensor, given: LazyMask | Tensor | None, is_causal: bool | None
) -> tuple[Mask, Tensor | None]:
    """The mask of this call, and an additive bias where a tensor mask came that the interface did not make."""
    queries, keys = q.shape[2], k.shape[2]
    if isinstance(given, LazyMask):
        mask = given.mask
        if (mask.queries, mask.keys) == (queries, keys):
            return mask, None
        if mask.queries == queries and mask.keys > keys:
            return mask.trimmed(0, keys), None
        raise ModelError(
            f"{type(module).__name__} was given a mask for {mask.queries}×{mask.keys} positions but attends over "
            f"{queries}×{keys}; this architecture can not be read"
        )
    if given is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        return Mask(queries, keys, right=0 if causal and queries > 1 else None), None
    if given.dtype == torch.bool:
        bias = torch.zeros_like(given, dtype=q.dtype).masked_fill(~given, float("-inf"))
    else:
        bias = given.masked_fill(given <= torch.finfo(given.dtype).min / 2, float("-inf"))
    return Mask(queries, keys), bias[..., :keys]


def register() -> None:
    """Enter the attention function and the mask function in transformers; done once, on import of this module."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lazy_mask)


register()


def claim(modules: Mapping[nn.Module, int], rows: object = None, tells: bool = False) -> object:
    """Say which modules are which layers of a part; one claimed before keeps its key, so edits reach it still.

    `rows` is the key of the part that says where this one's queries stand; `tells` that this is such a part.
    """
    known = [_sites[m] for m in modules if m in _sites]
    key = known[0].model if known else object()
    order = sorted(modules.values())
    for module, layer in modules.items():
        _sites[module] = Site(key, layer, order.index(layer), key if tells else rows)
    return key


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
class _Block:
    """One `with` block and the edits it put on; blocks of generators may end in any order and in any context."""

    edits: tuple[ActiveEdit, ...]
    ended: bool = False


@contextlib.contextmanager
def editing(model: object, edits: Sequence[ActiveEdit]) -> Iterator[None]:
    """Add edits of a model behind those that are on already; only these are taken off at the end."""
    block = _Block(tuple(edits))
    current = _edits.get()
    _edits.set({**current, model: (*current.get(model, ()), block)})
    try:
        yield
    finally:
        blocks = _edits.get().get(model, ())
        # begun in another context, which can not be reached from here: it must not see the edits any longer
        block.ended = block not in blocks
        left = tuple(other for other in blocks if other is not block and not other.ended)
        others = {key: value for key, value in _edits.get().items() if key is not model}
        _edits.set({**others, model: left} if left else others)


def unedited(model: object):
    """Run a model as it is, whatever edits are on around."""
    return _set(_edits, {key: edits for key, edits in _edits.get().items() if key is not model})


@contextlib.contextmanager
def alone(model: object) -> Iterator[None]:
    """Run a model as it is and unheard: no edits, no gates, no listeners of it."""
    listeners = tuple(x for x in _listeners.get() if x.model is not model)
    with unedited(model), _set(_listeners, listeners), _set(_gates, None):
        yield


def active(model: object) -> tuple[ActiveEdit, ...]:
    """The edits of a model that are on in this context."""
    return tuple(edit for block in _edits.get().get(model, ()) if not block.ended for edit in block.edits)


def listening(listener: Listener):
    """Hand every layer's attention to the listener."""
    return _set(_listeners, (*_listeners.get(), listener))


def tapping(model: object, tap: Tap):
    """Let a tap look at, and change, what the model's attention works with."""
    return _set(_taps, {**_taps.get(), model: tap})


def heard(model: object) -> bool:
    """Whether anybody listens to the model in this context."""
    return any(listener.model is model for listener in _listeners.get())


def hand_over(model: object, layer: int, map: AttentionMap, nothing: Tensor) -> None:
    """Give the listeners a map that did not come through `attention`; values and outputs are `nothing`, not seen."""
    for listener in _listeners.get():
        if listener.model is model:
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


@contextlib.contextmanager
def discovering() -> Iterator[list[tuple[nn.Module, AttentionMap]]]:
    """Collect the attention modules that call in, in their order."""
    found: list[tuple[nn.Module, AttentionMap]] = []
    with _set(_discovery, found):
        yield found
