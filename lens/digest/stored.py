"""What a model stores to compute with: its modules by path, and their values by name."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def walked(hf: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module by its path, in the order of `named_modules`, which takes six times as long; one that stands in two
    places comes twice."""
    found, waiting = [], [("", hf)]
    while waiting:
        path, module = waiting.pop()
        found.append((path, module))
        if module._modules:
            where = f"{path}." if path else ""
            inner = [(where + name, each) for name, each in module._modules.items() if each is not None]
            waiting += reversed(inner)
    return found


def stored(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    """Every value that a model stores to compute with, by name; what torch's own quantisation packs is no tensor.

    `state_dict` is not asked: bitsandbytes unpacks 4 bit weights for it on a CPU and leaves their scales in another
    order, so that the model gives other numbers from then on.
    """
    packs = "bitsandbytes" in sys.modules
    for path, module in modules:
        where = f"{path}." if path else ""
        known = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in known:
                yield where + name, tensor
                if packs:
                    yield from _beside(f"{where}{name}", tensor)
        if packs:
            yield from _beside(path, module)
        if is_packed(module):
            packed: dict[str, Any] = {}
            module._save_to_state_dict(packed, where, True)
            yield from (
                (name, value) for name, value in packed.items() if not isinstance(value, nn.Parameter)
            )


def is_packed(module: nn.Module) -> bool:
    """Whether torch's own quantisation has packed the weights of a module."""
    return type(module).__module__.startswith("torch.ao.")


def _beside(where: str, holder: Any) -> Iterator[tuple[str, Any]]:
    """The tensors that bitsandbytes keeps as attributes of its modules, its parameters and their states."""
    for name, value in vars(holder).items():
        if _of_bitsandbytes(holder) and type(value) is Tensor:
            yield f"{where}.{name}", value
        elif _of_bitsandbytes(value) and not isinstance(value, nn.Module | nn.Parameter):
            yield from _beside(f"{where}.{name}", value)


def _of_bitsandbytes(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "bitsandbytes"
