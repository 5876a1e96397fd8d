"""Replace the `forward` of modules by functions, for the current context only; other threads run the real modules.

A forward hook can change the output of a module but can not skip its computation; a replaced `forward` can.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

Function = Callable[..., Any]
_acting: ContextVar[Mapping[nn.Module, Function]] = ContextVar(
    "headwater_standing_in", default=MappingProxyType({})
)


@dataclass
class _Place:
    """The `forward` put on a module, how many `with` blocks of any thread use it, and the `forward` set before it."""

    give: Function
    before: Function | None
    users: int = 0


_places: dict[nn.Module, _Place] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def standing_in(functions: Mapping[nn.Module, Function]) -> Iterator[None]:
    """Inside the block each module returns what its function returns; None means: run the module itself."""
    token = _acting.set({**_acting.get(), **functions})
    for module in functions:
        _enter(module)
    try:
        yield
    finally:
        _acting.reset(token)
        for module in functions:
            _leave(module)


def is_replaced(module: nn.Module) -> bool:
    """Whether a function of this context stands in for the module."""
    return module in _acting.get()


def runs_itself(module: nn.Module) -> bool:
    """Whether a module runs the `forward` of its class, not one that other code has set on the instance."""
    place = _places.get(module)
    return "forward" not in vars(module) if place is None else place.before is None


def _enter(module: nn.Module) -> None:
    """Put one dispatching `forward` on the module; every context shares it.

    Where the context has no function for the module it calls the `forward` found there, also one that other code set.
    """
    with _lock:
        if module not in _places:
            forward = module.forward

            def give(*args: Any, **kwargs: Any) -> Any:
                function = _acting.get().get(module)
                found = None if function is None else function(*args, **kwargs)
                return forward(*args, **kwargs) if found is None else found

            _places[module] = _Place(give, vars(module).get("forward"))
            module.forward = give
        _places[module].users += 1


def _leave(module: nn.Module) -> None:
    with _lock:
        place = _places[module]
        place.users -= 1
        if place.users:
            return
        del _places[module]
        if vars(module).get("forward") is place.give:
            if place.before is None:
                del module.forward
            else:
                module.forward = place.before
