"""Functions that stand in for a model's modules, in one context alone: other threads run the modules as they are.

A hook can change what a module gives, but not keep it from running; here its own work is not done.
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
    """The function put on a module for `users` contexts of any thread, and what somebody had put there before."""

    give: Function
    before: Function | None
    users: int = 0


_places: dict[nn.Module, _Place] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def standing_in(functions: Mapping[nn.Module, Function]) -> Iterator[None]:
    """Inside, each module gives what its function gives; where that is None, what it gives itself."""
    token = _acting.set({**_acting.get(), **functions})
    for module in functions:
        _enter(module)
    try:
        yield
    finally:
        _acting.reset(token)
        for module in functions:
            _leave(module)


def runs_itself(module: nn.Module) -> bool:
    """Whether a module's work is that of its class: nobody else has put a function in its place."""
    place = _places.get(module)
    return "forward" not in vars(module) if place is None else place.before is None


def _enter(module: nn.Module) -> None:
    """One function serves all contexts; a module that somebody else replaced goes on with theirs."""
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
