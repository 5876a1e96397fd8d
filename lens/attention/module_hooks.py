"""Forward hooks that act only in the context (contextvars) that installed them.

torch calls a hook in every thread that runs the module. A hook of this file does nothing in other threads and tasks,
and after `deepcopy` or `pickle` the copy of the module has a hook that does nothing. `with` blocks may end in any order
and in any context.
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
    """The hook function of one `with` block; `given` is the number of arguments of a hook with keyword arguments.

    torch stores separately which hooks take keyword arguments, and reads that when it calls them. While one thread
    registers or removes the hook, another thread can therefore call it without them; such a call does nothing.
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
    modules: nn.Module | Iterable[nn.Module], before: Before | None = None, after: After | None = None,
    early: bool = False,
) -> Iterator[None]:  # fmt: skip
    """Inside, call `before(module, args, kwargs)` and `after(module, args, kwargs, output)` at each call of a module.

    Hooks of one module run in the order of their blocks. The result of `before` replaces the arguments, the result of
    `after` replaces the output; None changes nothing. With `early` `after` runs before all hooks that are on by then,
    such as those with which transformers collects hidden states.
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
                handles.append(module.register_forward_hook(leaving, with_kwargs=True, prepend=early))
        yield
    finally:
        entering.act = leaving.act = (
            None  # if the block ends in another context, `_on` still holds them in its own
        )
        _on.set(_on.get() - {entering, leaving})
        for handle in handles:
            handle.remove()


class Lasting:
    """A hook that stays on the modules and acts in every context; it must change nothing that a module gives."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        """Other arguments for one call of the module; None for those that it was given."""
        raise NotImplementedError


def stay(modules: Iterable[nn.Module], hook: Lasting) -> bool:
    """Put a lasting hook on the modules that have none of its kind; whether any had none."""
    new = [m for m in modules if not any(isinstance(h, type(hook)) for h in m._forward_pre_hooks.values())]
    for module in new:
        module.register_forward_pre_hook(hook, with_kwargs=True)
    return bool(new)


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Inside, no hook of this file acts in this context."""
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
    """The output tensor of a module; the first one of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def with_first_output(output: Any, tensor: Tensor) -> Any:
    """The same output with another first tensor."""
    return tensor if isinstance(output, Tensor) else (tensor, *output[1:])


def stay_around(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
    """Call `before(module, args)` and `after(module, args, output)` at each call from now on, in every context; `after`
    also where the call fails. Copies of the module keep both."""
    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)


def take_off(module: nn.Module, kinds: tuple[type, ...]) -> None:
    """Remove what `stay_around` put on, by its classes."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
