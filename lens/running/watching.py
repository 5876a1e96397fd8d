"""What passes through a model while it runs, for one caller alone: calls of modules, and each layer's attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention.module_hooks import first_output, hidden_states, on, with_hidden_states
from headwater.lens.errors import AnalysisError
from headwater.lens.models.opened import Opened


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its arguments, and the tensor it gave (the first, where it gave several)."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def given(self) -> Tensor:
        """The hidden states it was called with."""
        return hidden_states(self.args, self.kwargs).detach()

    def again(self, states: Tensor) -> Tensor:
        """The module on other hidden states, with everything else as it was."""
        args, kwargs = with_hidden_states(self.args, self.kwargs, states)
        return first_output(self.module(*args, **kwargs))


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


@contextlib.contextmanager
def watching(modules: Iterable[nn.Module]) -> Iterator[list[Call]]:
    """Calls of the modules made in this context, in the order they end."""
    found: list[Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append(Call(module, args, kwargs, first_output(output).detach()))

    with on(modules, after=keep):
        yield found
