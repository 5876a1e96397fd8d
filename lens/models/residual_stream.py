"""Reading the residual stream where blocks begin and behind the last, with hooks that look at the caller's context.

The hooks are put on a model's blocks when it is first read so, and stay; they do nothing for whoever does not listen,
and nothing on a copy of the model.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from headwater.lens.models import blocks
from headwater.lens.models.opened import Opened

Take = Callable[[int | str, Tensor], None]

_places: WeakKeyDictionary[nn.Module, tuple[object, int, bool]] = WeakKeyDictionary()
_listeners: ContextVar[tuple[tuple[object, Take], ...]] = ContextVar("headwater_residuals", default=())
_lock = threading.Lock()


@contextlib.contextmanager
def listening(model: Opened, take: Take) -> Iterator[None]:
    """Hand `take` the stream entering each layer, and behind the last as "final", [batch, position, d_model]."""
    _install(model)
    token = _listeners.set((*_listeners.get(), (model.key, take)))
    try:
        yield
    finally:
        _listeners.reset(token)


def _install(model: Opened) -> None:
    with _lock:
        for layer in model.layers:
            block = blocks.block(model, layer).module
            if block in _places:
                continue
            # a copy of a model brings the hooks of the original with it
            if _entering not in block._forward_pre_hooks.values():
                block.register_forward_pre_hook(_entering, with_kwargs=True)
                block.register_forward_hook(_leaving)
            _places[block] = model.key, layer, layer == model.layers[-1]


def _entering(block: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
    # another thread may call it without keywords while it is put on (see `context.Staying`)
    if kwargs is not None and _listeners.get() and block in _places:
        key, layer, _ = _places[block]
        _tell(key, layer, args[0] if args else kwargs["hidden_states"])


def _leaving(block: nn.Module, args: tuple, output: Any) -> None:
    if _listeners.get() and block in _places:
        key, _, last = _places[block]
        if last:
            _tell(key, "final", output[0] if isinstance(output, tuple) else output)


def _tell(key: object, place: int | str, stream: Tensor) -> None:
    for model, take in _listeners.get():
        if model is key:
            take(place, stream)
