"""The two functions that transformers calls instead of its own attention and mask, and the context they read.

`register()` enters both under the name "headwater". The mask function returns a description (`LazyMask`), so no
queries × keys mask is built. Which edits are on, and who is listening, travels in context variables and never on the
model: threads, tasks and sessions that share a model can not see each other's edits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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
from headwater.kernels.mask import Mask
from headwater.kernels.operator import AttentionMap
from headwater.kernels.rule import ScoreRule
from headwater.lens.errors import ModelError
from headwater.lens.masks import LazyMask, lazy_mask

NAME = "headwater"  # transformers reads meaning into names with "sdpa", "flash" or "flex" in them


class Site(NamedTuple):
    """Where an attention module stands: its model, its layer, and which of the attention layers that is."""

    model: object
    layer: int
    place: int


@dataclass(frozen=True, eq=False)
class Lowered:
    """What the active edits come to in one layer, as the kernels take them."""

    scores: tuple[ScoreEdit, ...] = ()
    weights: tuple[WeightEdit, ...] = ()
    outputs: tuple[OutputEdit, ...] = ()


class ActiveEdit(Protocol):
    """An edit made ready for a model."""

    def lower(self, layer: int, mask: Mask) -> Lowered: ...


class Listener(Protocol):
    """Somebody who is handed every layer's attention of one model while it runs.

    `statistics` are the names it will ask every map for: a kernel that has them from the forward pass keeps them.
    """

    model: object
    statistics: tuple[str, ...]

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None: ...


_sites: WeakKeyDictionary[nn.Module, Site] = WeakKeyDictionary()
_edits: ContextVar[Mapping[object, tuple[ActiveEdit, ...]]] = ContextVar(
    "headwater_edits", default=MappingProxyType({})
)
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("headwater_listeners", default=())
_gates: ContextVar[tuple[object, Tensor] | None] = ContextVar("headwater_gates", default=None)
_backend: ContextVar[str] = ContextVar("headwater_backend", default="auto")
_discovery: ContextVar[list[tuple[nn.Module, AttentionMap]] | None] = ContextVar(
    "headwater_discovery", default=None
)


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
    active = () if site is None else _edits.get().get(site.model, ())
    lowered = [edit.lower(site.layer, mask) for edit in active] if site is not None else []
    scores = tuple(e for part in lowered for e in part.scores)
    weights = tuple(e for part in lowered for e in part.weights)
    rule = ScoreRule(float(scale), mask, softcap, s_aux, bias, scores)
    listeners = [x for x in _listeners.get() if site is not None and x.model is site.model]
    wanted = tuple(dict.fromkeys(name for listener in listeners for name in listener.statistics))
    z, map = attend(query, key, value, rule, weights, _backend.get(), wanted)
    z = _outputs(z, site, mask, [e for part in lowered for e in part.outputs])
    found = _discovery.get()
    if found is not None:
        found.append((module, map))
    if site is not None:
        for listener in listeners:
            listener.take(site.layer, map, value, z)
    return z.transpose(1, 2).contiguous(), None


def _outputs(z: Tensor, site: Site | None, mask: Mask, edits: Sequence[OutputEdit]) -> Tensor:
    """Edits of the heads' outputs in their order, then the differentiable gate."""
    if edits:
        start = torch.zeros(1, dtype=torch.long) if mask.start is None else mask.start.cpu()
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


def claim(modules: Mapping[nn.Module, int]) -> object:
    """Say which modules are which layers of a model; one claimed before keeps its key, so edits reach it still."""
    known = [_sites[m] for m in modules if m in _sites]
    key = known[0].model if known else object()
    order = sorted(modules.values())
    for module, layer in modules.items():
        _sites[module] = Site(key, layer, order.index(layer))
    return key


@contextlib.contextmanager
def _set(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def editing(model: object, edits: Sequence[ActiveEdit]):
    """Add edits of a model behind those that are on already."""
    current = _edits.get()
    return _set(_edits, {**current, model: (*current.get(model, ()), *edits)})


def unedited(model: object):
    """Run a model as it is, whatever edits are on around."""
    return _set(_edits, {key: edits for key, edits in _edits.get().items() if key is not model})


def active(model: object) -> tuple[ActiveEdit, ...]:
    """The edits of a model that are on in this context."""
    return _edits.get().get(model, ())


def listening(listener: Listener):
    """Hand every layer's attention to the listener."""
    return _set(_listeners, (*_listeners.get(), listener))


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
