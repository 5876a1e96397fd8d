"""The settings of an analysis, read from its typed keyword parameters, and their limits.

A `Setting` describes an input field: its kind (number, integer, flag, choice, positions, text), default, limits and
help line. `parse` reads a value from text; `check` refuses a value of another type or outside the limits. The command
line and the dashboard build their inputs from settings; `checked` applies the same checks to calls from Python.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

from torch import Tensor

from headwater.lens.errors import AnalysisError, nearest
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head

Given = ParamSpec("Given")
Result = TypeVar("Result")
Kind = Literal["number", "integer", "flag", "choice", "positions", "text"]
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Bounds:
    """Limits of a numeric setting, both inclusive; with `above`, `low` is exclusive. None is no limit."""

    low: float | None = None
    high: float | None = None
    above: bool = False

    def hold(self, value: Any) -> bool:
        """Whether `value` is within the limits; NaN never is."""
        at_least = self.low is None or (value > self.low if self.above else value >= self.low)
        at_most = self.high is None or value <= self.high
        return bool(at_least and at_most and value == value)

    def __str__(self) -> str:
        low = "" if self.low is None else f" {'above' if self.above else 'from'} {self.low:g}"
        return (
            low if self.high is None else f"{low} {'to' if low and not self.above else 'up to'} {self.high:g}"
        )


# settings that many analyses have
BatchSize = Annotated[int, "texts, examples or pairs of equal length that run together", Bounds(1)]
Draws = Annotated[int, "redrawings of the texts, examples or pairs for the interval", Bounds(1)]
Seed = Annotated[int, "seed of what is drawn", Bounds(0)]


@dataclass(frozen=True)
class Setting:
    """One keyword parameter of an analysis, described for an input field."""

    name: str
    kind: Kind
    default: Any
    help: str = ""
    choices: tuple[str, ...] = ()
    bounds: Bounds = Bounds()
    optional: bool = False
    all: bool = True  # whether positions may be "all"
    hint: Any = Any  # the type that values have in Python

    @property
    def required(self) -> bool:
        """Whether it has no default and must be given."""
        return self.default is inspect.Parameter.empty

    @property
    def opens(self) -> bool:
        """Whether a text may name a file, which is then read or written."""
        return Path in _members(self.hint)

    @property
    def lists_texts(self) -> bool:
        """Whether a list of texts is taken, which are no names of files."""
        return Sequence[str] in _members(self.hint)

    @property
    def names_heads(self) -> bool:
        """Whether it takes names of heads."""
        return Sequence[str | Head] in _members(self.hint)

    @property
    def names_layers(self) -> bool:
        """Whether it takes numbers of layers; they have no type of their own, but such settings are called so."""
        return self.kind in ("integer", "positions") and self.name.split("_")[-1] in ("layer", "layers")

    def parse(self, text: str) -> Any:
        """The value of `text`; "none" or empty text is None where the setting is optional."""
        if self.optional and text.strip().lower() in ("", "none"):
            return None
        if self.kind == "text":
            return text  # " Mary" is another token than "Mary"
        text = text.strip()
        try:
            return self.check(self._read(text))
        except ValueError:
            raise AnalysisError(f"{self.name}={text!r} is not {self._wanted(typed=True)}") from None

    def check(self, value: Any) -> Any:
        """Return `value`, or raise AnalysisError with the setting, the value and the limits."""
        if value is None and self.optional:
            return value
        if not _fits(value, self.hint):
            rule = "unknown; give" if self.kind == "choice" else "not"
            raise AnalysisError(f"{self.name}={_shown(value)} is {rule} {self._wanted()}")
        if self.kind in ("number", "integer") and not self.bounds.hold(value):
            raise AnalysisError(f"{self.name}={value} is outside its limits; give {self._wanted()}")
        return value

    def _read(self, text: str) -> Any:
        if self.kind == "number":
            return float(text)
        if self.kind == "integer":
            return int(text)
        if self.kind == "flag":
            if text.lower() not in TRUE + FALSE:
                raise ValueError(text)
            return text.lower() in TRUE
        if self.kind == "positions":
            if text == "all" and self.all:
                return text
            return [int(part) for part in text.replace(",", " ").split()]
        return text

    def _wanted(self, typed: bool = False) -> str:
        """What fits: as it is `typed` in a terminal, else as Python writes it."""
        none = " (or none)" if self.optional else ""
        parts = [
            typing.get_args(each)[0] for each in _members(self.hint) if typing.get_origin(each) is Sequence
        ]
        listed = " or ".join({float: "numbers", int: "whole numbers"}.get(part, "texts") for part in parts)
        text = "text, a whole number" if int in _members(self.hint) else "text"
        return {
            "number": f"a number{self.bounds}",
            "integer": f"a whole number{self.bounds}",
            "flag": "yes or no" if typed else "True or False",
            "choice": f"one of {', '.join(self.choices)}",
            "positions": (
                'whole numbers such as "0,-1"' if typed else "a list of whole numbers such as [0, -1]"
            )
            + ', or "all"' * self.all,
            "text": f"{text} or a list of {listed}" if listed else text,
        }[self.kind] + none


def checked(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`function` with a check of its settings against their annotations before each call."""
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())

    @functools.wraps(function)
    def held(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        for name in kwargs:
            if name not in names and not open_ended:
                raise AnalysisError(f"{function.__name__} has no setting {name!r}; {nearest(name, names)}")
        given = dict(zip(names, args, strict=False)) | kwargs
        # annotations are read at the first call, when every module is loaded
        for setting in settings_of(function):
            if setting.name in given:
                setting.check(given[setting.name])
        return function(*args, **kwargs)

    return held


@functools.cache
def settings_of(function: Callable[..., Any]) -> tuple[Setting, ...]:
    """Settings of `function` in their order: those with a default or `Annotated` type, but no functions and tensors."""
    bare = inspect.unwrap(function)
    # the return type may belong to a library that is imported only when the function runs
    told = {name: hint for name, hint in bare.__annotations__.items() if name != "return"}
    hints = typing.get_type_hints(
        types.SimpleNamespace(__annotations__=told), bare.__globals__, include_extras=True
    )
    found = (
        _setting(name, hints.get(name, Any), parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty or typing.get_origin(hints.get(name)) is typing.Annotated
    )
    return tuple(setting for setting in found if setting is not None)


def _setting(name: str, hint: Any, default: Any) -> Setting | None:
    annotated = typing.get_origin(hint) is typing.Annotated
    hint, *notes = typing.get_args(hint) if annotated else (hint,)
    help_line = next((note for note in notes if isinstance(note, str)), "")
    bounds = next((note for note in notes if isinstance(note, Bounds)), Bounds())
    origins = {typing.get_origin(member) or member for member in _members(hint)}
    if origins & {Callable, Any, Tensor, HookedModel}:  # cannot be given as text, only from Python
        return None
    literals = [each for each in _members(hint) if typing.get_origin(each) is Literal]
    known = [choice for literal in literals for choice in typing.get_args(literal)]
    optional = type(None) in origins or None in known
    choices = tuple(choice for choice in known if choice is not None)
    if int in origins and str not in origins and origins & {Sequence, Iterable}:
        kind: Kind = "positions"
    elif choices:
        kind = "choice"
    else:
        # a token may be a word or an id, and is then typed as text, such as "Mary" or "#17"
        kinds: dict[Any, Kind] = {str: "text", bool: "flag", int: "integer", float: "number"}
        kind = next(word for of, word in kinds.items() if of in origins)
    every = "all" in choices or str in origins
    choices = choices if kind == "choice" else ()
    return Setting(name, kind, default, help_line, choices, bounds, optional, every, hint)


def _members(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of type `hint`. Numbers and lists may be numpy's or torch's; booleans are not numbers."""
    return any(_is(value, typing.get_origin(each) or each, typing.get_args(each)) for each in _members(hint))


def _is(value: Any, kind: Any, parts: tuple[Any, ...]) -> bool:
    plain = value.tolist() if hasattr(value, "tolist") else value
    if kind is Any:
        return True
    if kind is Literal:
        return plain in parts
    if kind in (int, float):
        return isinstance(plain, Integral if kind is int else Real) and not isinstance(plain, bool)
    if kind is bool:
        return isinstance(plain, bool)
    if kind in (Sequence, Iterable):
        listed = isinstance(plain, Collection) and not isinstance(plain, str | bytes | Mapping)
        return listed and all(_fits(each, parts[0]) for each in plain)
    return isinstance(value, kind)


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, Real) else repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"an object of {type(value).__name__}"
