"""Record module calls and the attention of each layer while a model runs, in the caller's context only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention.module_hooks import first_output, hidden_states, on, with_hidden_states
from headwater.lens.errors import AnalysisError
from headwater.lens.models.opened import Opened

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")  # arguments of blocks


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
        """The output of the module for other hidden states and otherwise the same arguments.

        Of one row it takes many variants at once; other states [1, position, feature], such as an encoder's, go along.
        Keys and values that the first run left in a cache are no argument of another run.
        """
        along = partial(_along, row=self.given, count=len(states))
        args, kwargs = with_hidden_states(tuple(map(along, self.args)), self.kwargs, states)
        kwargs = {name: None if name in CACHES else along(value) for name, value in kwargs.items()}
        return first_output(self.module(*args, **kwargs))


def _along(value: Any, row: Tensor, count: int) -> Any:
    """States of one row for `count` variants of it."""
    states = isinstance(value, Tensor) and value.dim() == 3 and len(value) == len(row) == 1
    return value.expand(count, -1, -1) if states else value


class Heads:
    """Listener that keeps (map, values [batch, kv head, key, d], z) of each layer; z keeps its gradient graph."""

    def __init__(self, model: Opened) -> None:
        if model.read_only:
            raise AnalysisError(f"{model.name} shows neither values nor head outputs: {model.read_only}")
        self.model = model.key
        self.statistics: tuple[str, ...] = ()
        self.grad = False
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
