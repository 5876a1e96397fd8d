"""`Arguments`: what a module's `forward` takes, as tensors with names, and back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.lens.errors import PromptError, nearest


class Arguments:
    """The arguments of `module.forward` after the pattern of a sample.

    Every tensor has a name: that of its argument, with the keys or places inside of a dictionary or list behind it
    ("cond.text", "states.0"). What is no tensor stays as it is in the sample.
    """

    def __init__(self, module: nn.Module, sample: Any) -> None:
        self.module = module
        self._kind = type(module).__name__
        self._signature = inspect.signature(module.forward)
        self._pattern: Mapping[str, Any] = self._bound(sample, {})
        self.tensors = dict(leaves(self._pattern))
        if not self.tensors:
            raise PromptError(f"the sample holds no tensor; give what {self._kind}.forward takes")

    def named(self, given: Any, more: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a call by name. `given` is a tensor, a tuple of arguments or a dictionary, `more` are further
        arguments by name. PromptError for an argument that is missing or unknown, or is no number."""
        bound = self._bound(given, more)
        found = dict(leaves(bound))
        for name, value in bound.items():
            if name not in self._pattern and not isinstance(value, Tensor) and value is not None:
                raise PromptError(
                    f"{name} is no tensor and not in the sample; what is no tensor comes from hw.load(module, sample=…)"
                )
        for name, value in _flat(bound):
            if name in self.tensors and not isinstance(value, Tensor):
                raise PromptError(f"{name} is a tensor in the sample; got {value!r:.40}")
        fixed, others = dict(_others(bound)), dict(_others(self._pattern))
        changed = [name for name in fixed if name in others and fixed[name] != others[name]]
        if changed:
            raise PromptError(
                f"{changed[0]} is {fixed[changed[0]]!r:.40}, and {others[changed[0]]!r:.40} in the sample; what is no "
                "tensor stays as it was loaded"
            )
        for name, tensor in found.items():
            if tensor.is_floating_point() and tensor.isnan().any():
                raise PromptError(f"{name} holds NaN; give numbers")
            if tensor.numel() == 0:
                raise PromptError(f"{name} is empty; its shape is {list(tensor.shape)}")
        return found

    def filled(self, tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments with these tensors. An argument that lacks its tensors is left out."""
        given = {}
        for name, value in self._pattern.items():
            wanted = dict(leaves({name: value}))
            if all(each in tensors for each in wanted):
                given[name] = _put(name, value, tensors)
        given |= {name: tensor for name, tensor in tensors.items() if name not in self.tensors}
        bound = inspect.BoundArguments(self._signature, given)  # type: ignore[arg-type]
        return bound.args, bound.kwargs

    def _bound(self, given: Any, more: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by the names of the signature."""
        if isinstance(given, Mapping):
            args, kwargs = (), dict(given)
        else:
            args, kwargs = (tuple(given) if isinstance(given, tuple | list) else (given,)), {}
        args = () if len(args) == 1 and args[0] is None else tuple(map(as_tensors, args))
        kwargs, more = ({name: as_tensors(each) for name, each in given.items()} for given in (kwargs, more))
        known = self._signature.parameters
        if not any(each.kind == each.VAR_KEYWORD for each in known.values()):
            unknown = [str(name) for name in (*kwargs, *more) if name not in known]
            if unknown:
                raise PromptError(
                    f"{self._kind}.forward takes no {unknown[0]!r}: {nearest(unknown[0], known)}"
                )
        try:
            bound = self._signature.bind(*args, **kwargs, **more)
        except TypeError as error:
            raise PromptError(
                f"{self._kind}.forward can not be called so: {error}; it takes ({', '.join(known)})"
            ) from None
        return {name: value for name, value in bound.arguments.items() if value is not None}


def leaves(given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything inside."""
    for name, value in _flat(given):
        if isinstance(value, Tensor):
            yield name, value


def _others(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything inside that is no tensor and can be compared."""
    for name, value in _flat(given):
        if isinstance(value, bool | int | float | str):
            yield name, value


def _flat(given: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(given, Mapping):
        items = given.items()
    elif isinstance(given, list | tuple) and type(given) in (list, tuple):
        items = enumerate(given)
    else:
        yield name, given
        return
    for key, value in items:
        yield from _flat(value, f"{name}.{key}" if name else str(key))


def _put(name: str, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The same value with its tensors replaced by those of the same names."""
    if isinstance(value, Tensor):
        return tensors[name]
    if isinstance(value, Mapping):
        return {key: _put(f"{name}.{key}", each, tensors) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_put(f"{name}.{i}", each, tensors) for i, each in enumerate(value))
    return value


def numbers_in(out: Any) -> Iterator[Tensor]:
    """All floating-point tensors of an output, in order: of tuples, dictionaries and objects with attributes."""
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out.to_padded_tensor(0.0) if out.is_nested else out
    elif isinstance(out, Mapping | list | tuple):
        for item in out.values() if isinstance(out, Mapping) else out:
            yield from numbers_in(item)
    elif hasattr(out, "__dict__") and not isinstance(out, nn.Module | type):
        for item in vars(out).values():
            yield from numbers_in(item)


def batch_axes(tensors: Mapping[str, Tensor], batch: int) -> dict[str, int | None]:
    """The axis of each tensor that counts the examples: the first of its first two of that size; None without one."""
    return {
        name: next((axis for axis in (0, 1) if given.dim() > axis and given.shape[axis] == batch), None)
        for name, given in tensors.items()
    }


def as_tensors(given: Any) -> Any:
    """Arrays of numbers as tensors, other things as they are."""
    numbers = isinstance(given, np.ndarray) and given.dtype.kind in "biuf"
    return torch.from_numpy(np.ascontiguousarray(given)) if numbers else given
