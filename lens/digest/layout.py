"""`Layout`: how a model is put together, as a digest tells of it, and whether it still is put together so.

A record asks for the digest of its model, so asking costs little: modules, attributes and names of tensors are compared
with those of the time before in a few sweeps. Only modules of which an attribute may change in place are told of anew
each time.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import chain, repeat
from operator import getitem, is_, itemgetter
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from headwater.lens.digest.stored import is_packed, stored, walked

PLAIN = (bool, int, float, str, type(None))
# attributes that name things, or that change from run to run without changing a number
NAMES = {
    "training", "name_or_path", "warnings_issued", "layer_idx", "layer_id", "supports_gradient_checkpointing",
    "gradient_checkpointing", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method",
    "dtype", "max_seq_len_cached", "config", "generation_config", "all_tied_weights_keys", "loss_type", "model_tags",
}  # fmt: skip
# their functions on a module run, keep or trace it; what they change is in tensors and attributes
OWN = {"headwater", "transformers", "torch", "accelerate", "peft", "bitsandbytes", "functools"}
PASSED_OVER = NAMES | vars(nn.Module()).keys()
INSIDE = ("_modules", "_parameters", "_buffers")

written = json.JSONEncoder(sort_keys=True, default=repr).encode


class Layout:
    """The modules of a model by path, the line that a digest has of each, and the names of their tensors."""

    def __init__(self, hf: nn.Module) -> None:
        found = walked(hf)
        modules = [module for _, module in found]
        self._paths = [path for path, _ in found]
        # no module and no tensor is held, as one that is replaced would stay in memory
        self._modules = [weakref.ref(module) for module in modules]
        self._kinds = list(map(type, modules))
        # modules that TorchScript has compiled keep these in things of its own
        self._lasts = all(isinstance(vars(each).get(inside), dict) for each in modules for inside in INSIDE)
        self._packed = any(map(is_packed, modules))
        if self._lasts:
            places = list(map(vars, modules))
            self._names = _names(places)
            self._children = [
                None if each is None else weakref.ref(each) for each in _each(places, "_modules")
            ]
            self._fleeting = [set(place["_non_persistent_buffers_set"]) for place in places]
        named = [
            (f"{path}.{name}" if path else name, name in module._non_persistent_buffers_set)
            for inside in ("_parameters", "_buffers")
            for path, module in found
            for name in getattr(module, inside).keys()  # noqa: SIM118
        ]
        self._weights = sorted((name, n) for n, (name, fleeting) in enumerate(named) if not fleeting)
        self._write_lines(found)

    def _write_lines(self, found: Sequence[tuple[str, nn.Module]]) -> None:
        first: dict[nn.Module, str] = {}
        for path, module in found:
            first.setdefault(module, path)
        by_path = sorted(((path, module) for module, path in first.items()), key=itemgetter(0))
        told = {module: [name for name in vars(module) if name not in PASSED_OVER] for module in first}
        self._known = [
            not _hooked(vars(module)) and all(isinstance(vars(module)[name], PLAIN) for name in told[module])
            for _, module in found
        ]
        lasts = {module for (_, module), known in zip(found, self._known, strict=True) if known}
        self._lines = [_line(path, module) if module in lasts else b"" for path, module in by_path]
        self._anew = [
            (n, path, weakref.ref(module)) for n, (path, module) in enumerate(by_path) if module not in lasts
        ]
        self._told = [told[module] if module in lasts else [] for _, module in found]
        self._values = list(_values([vars(module) for _, module in found], self._told))
        self._buffered = [(path, weakref.ref(module)) for module, path in first.items() if module._buffers]

    def still(self) -> bool:
        """Whether all is as it was, but for numbers in tensors and modules that are told of anew each time."""
        modules: list[Any] = [ref() for ref in self._modules]
        if not self._lasts or self._kinds != list(map(type, modules)):
            return False
        places = list(map(vars, modules))
        return (
            self._names == _names(places)
            and all(map(is_, _each(places, "_modules"), [ref and ref() for ref in self._children]))
            and self._fleeting == list(map(itemgetter("_non_persistent_buffers_set"), places))
            and all(map(is_, _values(places, self._told), self._values))
            and not any(known and _hooked(place) for place, known in zip(places, self._known, strict=True))
        )

    def lines(self) -> list[bytes]:
        """What is told of the modules, each under its first path, by path."""
        lines = list(self._lines)
        for n, path, ref in self._anew:
            if (module := ref()) is not None:
                lines[n] = _line(path, module)
        return lines

    def weights(self) -> list[tuple[str, Any]]:
        """Every value that the model stores to compute with, by name."""
        modules: list[Any] = [ref() for ref in self._modules]
        if not self._lasts or self._packed or "bitsandbytes" in sys.modules:
            return sorted(stored(zip(self._paths, modules, strict=True)), key=itemgetter(0))
        places = list(map(vars, modules))
        tensors = [*_each(places, "_parameters"), *_each(places, "_buffers")]
        return [(name, tensors[n]) for name, n in self._weights if tensors[n] is not None]

    def buffers(self) -> list[tuple[str, Tensor]]:
        """Every buffer, once, by the path of its first module."""
        found: dict[int, tuple[str, Tensor]] = {}
        for path, ref in self._buffered:
            for name, buffer in () if (module := ref()) is None else module._buffers.items():
                if buffer is not None:
                    found.setdefault(id(buffer), (f"{path}.{name}" if path else name, buffer))
        return sorted(found.values(), key=itemgetter(0))


def _each(places: Sequence[Mapping[str, Any]], inside: str) -> Iterator[Any]:
    """The children, parameters or buffers of all modules, whose attributes are given."""
    return chain.from_iterable([place[inside].values() for place in places])


def _names(places: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """How many attributes, children, parameters and buffers each module has, and the names of all."""
    found = [list(map(len, places)), list(chain.from_iterable(places))]
    for inside in INSIDE:
        inner = list(map(itemgetter(inside), places))
        found += [list(map(len, inner)), list(chain.from_iterable(inner))]
    return found


def _values(places: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> Iterator[Any]:
    """The attributes of these names, module by module."""
    return map(getitem, chain.from_iterable(map(repeat, places, map(len, names))), chain.from_iterable(names))


def _hooked(place: Mapping[str, Any]) -> bool:
    return bool(place.get("_forward_pre_hooks") or place.get("_forward_hooks"))


def _line(path: str, module: nn.Module) -> bytes:
    return written((path, *_told_of(module))).encode() + b"\n"


def _told_of(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """The class and plain attributes of a module."""
    plain = {}
    for name in vars(module).keys() - PASSED_OVER:
        # of a whole model, names with an underscore are plans for loading and for many devices
        if name.startswith("_is_hf") or (name.startswith("_") and isinstance(module, PreTrainedModel)):
            continue
        value = vars(module)[name]
        told = _told(value) if not _is_function(value) else _named(value)
        if told is not None:
            plain[name] = told
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    plain["hooks"] = [told for hook in hooks if (told := _named(hook)) is not None]
    return type(module).__qualname__, plain


def _is_function(value: Any) -> bool:
    return isinstance(value, FunctionType | MethodType | partial)


def _named(value: Any) -> str | None:
    """The name of a function; None for one of a package that puts it on every model."""
    kind = getattr(value, "func", value)
    kind = kind if hasattr(kind, "__qualname__") else type(kind)
    if kind.__module__.partition(".")[0] in OWN:
        return None
    return f"{kind.__module__}.{kind.__qualname__}"


def _told(value: Any) -> Any:
    """Plain data and small containers of it; None for what is neither."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        parts = [_told(part) for part in value]
        parts = sorted(parts, key=repr) if isinstance(value, set | frozenset) else parts
        return parts if all(part is not None for part in parts) else None
    if isinstance(value, dict):
        return {str(key): told for key, part in value.items() if (told := _told(part)) is not None}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {each.name: getattr(value, each.name) for each in fields(value)}
        return {name: _told(part) for name, part in parts.items()}
    return None
