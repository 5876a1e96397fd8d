"""Record module calls and the attention of each layer while a model runs, in the caller's context only."""

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
    """One call of a module: its arguments and its output tensor (the first one of a tuple)."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    @property
    def given(self) -> Tensor:
        """The hidden states among its arguments, detached."""
        return hidden_states(self.args, self.kwargs).detach()

    def again(self, states: Tensor) -> Tensor:
        """The output of the module for other hidden states and otherwise the same arguments."""
        args, kwargs = with_hidden_states(self.args, self.kwargs, states)
        return first_output(self.module(*args, **kwargs))


class Heads:
    """Listener that keeps (map, values [batch, kv head, key, d], z) of each layer; z keeps its gradient graph."""

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
    """Collect the calls of these modules in this context, in the order in which they end."""
    found: list[Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append(Call(module, args, kwargs, first_output(output).detach()))

    with on(modules, after=keep):
        yield found
