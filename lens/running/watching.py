"""What passes through a model while it runs, for one caller alone: calls of modules, and each layer's attention.

Hooks on modules are seen by every thread that runs the model; these keep nothing unless the context is the caller's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import context
from headwater.lens.errors import AnalysisError
from headwater.lens.models.opened import Opened


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its arguments, and the tensor it gave (the first, where it gave several)."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor

    @property
    def given(self) -> Tensor:
        """The hidden states it was called with."""
        return (self.args[0] if self.args else self.kwargs["hidden_states"]).detach()

    def again(self, states: Tensor) -> Tensor:
        """The module on other hidden states, with everything else as it was."""
        if self.args:
            found = self.module(states, *self.args[1:], **self.kwargs)
        else:
            found = self.module(**{**self.kwargs, "hidden_states": states})
        return found[0] if isinstance(found, tuple) else found


class Heads:
    """Listener that keeps each layer's map, values [batch, kv head, key, d] and head outputs, with their gradients."""

    def __init__(self, model: Opened) -> None:
        if model.read_only:
            raise AnalysisError(f"{model.name} shows neither values nor head outputs: {model.read_only}")
        self.model = model.key
        self.statistics: tuple[str, ...] = ()
        self.layers: dict[int, tuple[AttentionMap, Tensor, Tensor]] = {}

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None:
        self.layers[layer] = (map, value.detach(), output)


_kept: ContextVar[list[Call] | None] = ContextVar("headwater_watching", default=None)


@contextlib.contextmanager
def watching(modules: Iterable[nn.Module]) -> Iterator[list[Call]]:
    """Calls of the modules made in this context, in the order they end."""
    found: list[Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _kept.get() is found:
            given = output[0] if isinstance(output, tuple) else output
            found.append(Call(module, args, kwargs, given.detach()))

    hook = context.Staying(keep, 4)
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in dict.fromkeys(modules)]
    token = _kept.set(found)
    try:
        yield found
    finally:
        _kept.reset(token)
        for handle in handles:
            handle.remove()
