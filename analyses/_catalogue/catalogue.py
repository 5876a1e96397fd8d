"""The list of all analyses, read from the folder: one file, one public function of the same name.

The typed keyword parameters of that function are its settings. The command line and the dashboard make their inputs
from them. The modules are imported at the first call. A new file adds an analysis.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from textwrap import wrap
from typing import Any

from headwater.analyses._catalogue.about import Listed, file_of, files, room_questions, unlabelled
from headwater.analyses._catalogue.settings import Setting, settings_of
from headwater.kernels.notebook import cell, listing, table
from headwater.lens.errors import AnalysisError

PACKAGE = "headwater.analyses"


@dataclass(frozen=True, kw_only=True, repr=False)
class Entry(Listed):
    """One analysis: its labels, its settings and its function."""

    settings: tuple[Setting, ...]
    function: Callable[..., Any]

    def __repr__(self) -> str:
        return f"Entry({self.name!r}, of a {self.inputs})"

    def _repr_html_(self) -> str:
        facts = {
            "reads": self.inputs,
            "unit": self.unit,
            "cost": self.cost,
            "not for": self.not_for,
            "source": self.paper,
        }
        facts["settings"] = ", ".join(
            each.name if each.required else f"{each.name}={each.default!r}" for each in self.settings
        )
        return table(f"{self.name}: {self.question}", facts)

    @property
    def description(self) -> str:
        """The docstring of the function without labels and examples: formula, axes, conventions."""
        return unlabelled(inspect.getdoc(self.function) or "")

    def setting(self, name: str) -> Setting:
        """The setting called `name`. AnalysisError lists the known ones."""
        for setting in self.settings:
            if setting.name == name:
                return setting
        names = ", ".join(setting.name for setting in self.settings) or "none"
        raise AnalysisError(f"{self.name} has no setting {name!r}; its settings are {names}")


class Catalogue(dict[str, Entry]):
    """Analyses by name; printed under the questions that they answer."""

    def __repr__(self) -> str:
        lines = [f"{len(self)} analyses"]
        for question, names in self._by_question().items():
            lines += [question, *wrap(", ".join(names), 100, initial_indent="    ", subsequent_indent="    ")]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = []
        for question, names in self._by_question().items():
            rows = [(name, self[name].inputs, self[name].question) for name in names]
            told = listing(("analysis", "reads", "question"), rows)
            parts.append(f"<details><summary>{cell(question)} ({len(names)})</summary>{told}</details>")
        return f"<div><strong>{len(self)} analyses</strong>{''.join(parts)}</div>"

    def _by_question(self) -> dict[str, list[str]]:
        return {
            question: [name for name in self if self[name].room == room]
            for room, question in room_questions().items()
        }


@cache
def catalogue() -> Catalogue:
    """Every analysis by name, in alphabetical order."""
    return Catalogue({name: entry(name) for name in files()})


@cache
def entry(name: str) -> Entry:
    """The analysis called `name`; the others are not imported. AnalysisError offers the nearest names."""
    room = file_of(name).parent.name
    function = getattr(importlib.import_module(f"{PACKAGE}.{room}.{name}"), name)
    about, settings = vars(function.about), settings_of(function)
    return Entry(**about, name=name, room=room, settings=settings, function=function)
