"""One call for every analysis: a model and what it reads, whatever that is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headwater.analyses._catalogue.catalogue import Entry
from headwater.lens.model import HookedModel


def ask(
    asked: Entry, model: HookedModel, given: Sequence[Any], settings: Mapping[str, Any], *,
    layers: Sequence[int] | None = None, circuit: str | None = None,
) -> Any:  # fmt: skip
    """The result of an analysis. `given` are examples, or pairs for an analysis of pairs; nothing for one of the model.

    `layers` limits the record that an analysis reads. `circuit` is the file of the circuit that it judges (None: it is
    found first).
    """
    if asked.inputs == "record":
        kept = ("mixers",) if settings.get("mixers") == "effective" else ()
        some: dict[str, Any] = {} if layers is None else {"layers": list(layers)}
        return asked.function(model.record(given, keep=(*asked.keep, *kept), **some), **settings)
    if asked.inputs == "model+pairs":
        return asked.function(model, *_pairs(asked.function, given, circuit), **settings)
    return asked.function(model, *([given] if asked.inputs == "model+examples" else []), **settings)


def second_parameter(function: Callable[..., Any]) -> str:
    """Its name, or nothing."""
    return [*inspect.signature(function).parameters, "", ""][1]


def _pairs(function: Callable[..., Any], pairs: Sequence[Any], circuit: str | None) -> tuple[Any, ...]:
    """Pairs in the place in which the analysis takes them, behind the circuit if it judges one."""
    first = second_parameter(function)
    if first == "graph":
        return circuit, list(pairs)
    if first == "pairs" or any(not isinstance(pair, tuple) for pair in pairs):
        return (list(pairs),)
    return tuple(map(list, zip(*pairs, strict=True)))
