"""Hooks on a model's modules that act for one caller: in the context (contextvars) that put them on, and nowhere else.

torch runs a hook for every thread that runs the module. A hook of this file does nothing in another thread or task, and
a copy or pickle of the module gets a hook that does nothing. `with` blocks may end in any order and in any context.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

Given = tuple[tuple[Any, ...], dict[str, Any]]
Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Given | None]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


class _Hook:
    """One function of one block. `given` is how many arguments torch hands it, keywords among them.

    torch looks up whether a hook takes keywords when it calls it. While one thread puts a hook on or takes it off,
    another thread can call it without them.
    """

    def __init__(self, act: Callable[..., Any] | None = None, given: int = 0) -> None:
        self.act = act
        self._given = given

    def __call__(self, *given: Any) -> Any:
        act = self.act
        return None if act is None or self not in _on.get() or len(given) < self._given else act(*given)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


_on: ContextVar[frozenset[_Hook]] = ContextVar("headwater_module_hooks", default=frozenset())


@contextlib.contextmanager
def on(
    modules: nn.Module | Iterable[nn.Module], before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Inside, call `before(module, args, kwargs)` and `after(module, args, kwargs, output)` at each call of a module.

    Hooks of one module run in the order of their blocks. What `before` gives replaces the arguments, what `after` gives
    the output; None leaves them as they are.
    """
    targets = [modules] if isinstance(modules, nn.Module) else list(dict.fromkeys(modules))
    entering, leaving = _Hook(before, 3), _Hook(after, 4)
    handles = []
    _on.set(_on.get() | {entering, leaving})
    try:
        for module in targets:
            if before is not None:
                handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(leaving, with_kwargs=True))
        yield
    finally:
        entering.act = leaving.act = None  # the block may end in another context than the one that holds them
        _on.set(_on.get() - {entering, leaving})
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Inside, none of this caller's hooks act."""
    token = _on.set(frozenset())
    try:
        yield
    finally:
        _on.reset(token)


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states in a module's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor) -> Given:
    """The same arguments with other hidden states."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


def first_output(output: Any) -> Tensor:
    """The tensor a module gives; the first, where it gives several."""
    return output if isinstance(output, Tensor) else output[0]


def with_first_output(output: Any, tensor: Tensor) -> Any:
    """The same output with another first tensor."""
    return tensor if isinstance(output, Tensor) else (tensor, *output[1:])
