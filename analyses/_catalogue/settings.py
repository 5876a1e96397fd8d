"""The settings of an analysis, read from its typed keyword parameters, with the text a user types turned into
values.

A `Setting` says what kind of input it needs (number, integer, flag, choice, positions, text), its default,
its limits and its help line; `parse` reads it from text and `check` holds a value to the limits, each with a
one-line error.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from headwater.lens.errors import AnalysisError

Kind = Literal["number", "integer", "flag", "choice", "positions", "text"]
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Bounds:
    """Limits of a numeric setting, both included; None leaves a side open."""

    low: float | None = None
    high: float | None = None

    def hold(self, value: Any) -> bool:
        """Whether `value` is within the limits; NaN never is."""
        at_least = self.low is None or value >= self.low
        at_most = self.high is None or value <= self.high
        return at_least and at_most and value == value


@dataclass(frozen=True)
class Setting:
    """One keyword parameter of an analysis, as an input field needs it."""

    name: str
    kind: Kind
    default: Any
    help: str = ""
    choices: tuple[str, ...] = ()
    bounds: Bounds = Bounds()
    optional: bool = False
    all: bool = True  # whether positions may be "all"

    def parse(self, text: str) -> Any:
        """The value that `text` stands for; "none" (or nothing) is None where the setting may be left out."""
        text = text.strip()
        if self.optional and text.lower() in ("", "none"):
            return None
        try:
            return self.check(self._read(text))
        except ValueError:
            raise AnalysisError(f"{self.name}={text!r} is not {self._wanted()}") from None

    def check(self, value: Any) -> Any:
        """`value`, or an error that names the limits it is outside of."""
        if value is None and self.optional:
            return value
        if self.kind in ("number", "integer") and not self.bounds.hold(value):
            raise AnalysisError(f"{self.name}={value} is outside its limits; give {self._wanted()}")
        if self.kind == "choice" and value not in self.choices:
            raise AnalysisError(f"{self.name}={value!r} is unknown; give {self._wanted()}")
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
            return (
                "all"
                if text == "all" and self.all
                else [int(part) for part in text.replace(",", " ").split()]
            )
        return text

    def _wanted(self) -> str:
        low, high = self.bounds.low, self.bounds.high
        limits = "".join(
            f" {word} {limit:g}" for word, limit in (("from", low), ("up to", high)) if limit is not None
        )
        none = " (or none)" if self.optional else ""
        if self.kind == "choice":
            return f"one of {', '.join(self.choices)}{none}"
        return {
            "number": f"a number{limits}",
            "integer": f"a whole number{limits}",
            "flag": "yes or no",
            "positions": 'whole numbers such as "0,-1"' + ', or "all"' * self.all,
            "text": "text",
        }[self.kind] + none


def settings_of(function: Callable[..., Any]) -> tuple[Setting, ...]:
    """Settings of `function`: its parameters with a default that are not callables, in their order."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = (
        _setting(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    )
    return tuple(setting for setting in found if setting is not None)


def _setting(name: str, hint: Any, default: Any) -> Setting | None:
    notes: tuple[Any, ...] = ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, *rest = typing.get_args(hint)
        notes = tuple(rest)
    help_line = next((note for note in notes if isinstance(note, str)), "")
    bounds = next((note for note in notes if isinstance(note, Bounds)), Bounds())
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    origins = {typing.get_origin(member) or member for member in members}
    choices = tuple(
        choice
        for member in members
        if typing.get_origin(member) is Literal
        for choice in typing.get_args(member)
    )
    optional = type(None) in origins or None in choices
    choices = tuple(choice for choice in choices if choice is not None)
    if Callable in origins or Any in origins:  # for Python alone
        return None
    if int in origins and origins & {Sequence, Iterable}:
        kind: Kind = "positions"
    elif choices:
        kind = "choice"
    else:
        kinds: dict[Any, Kind] = {bool: "flag", int: "integer", float: "number", str: "text"}
        kind = next(word for of, word in kinds.items() if of in origins)
    return Setting(
        name,
        kind,
        default,
        help_line,
        choices if kind == "choice" else (),
        bounds,
        optional,
        "all" in choices or str in origins,
    )
