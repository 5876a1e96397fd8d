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
from typing import Any

from headwater.analyses._catalogue.about import Listed, file_of, files, unlabelled
from headwater.analyses._catalogue.settings import Setting, settings_of
from headwater.lens.errors import AnalysisError

PACKAGE = "headwater.analyses"


@dataclass(frozen=True, kw_only=True, repr=False)
class Entry(Listed):
    """One analysis: its labels, its settings and its function."""

    settings: tuple[Setting, ...]
    function: Callable[..., Any]

    def __repr__(self) -> str:
        return f"Entry({self.name!r}, of a {self.inputs})"

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


@cache
def catalogue() -> dict[str, Entry]:
    """Every analysis by name, in alphabetical order."""
    return {name: entry(name) for name in files()}


@cache
def entry(name: str) -> Entry:
    """The analysis called `name`; the others are not imported. AnalysisError offers the nearest names."""
    room = file_of(name).parent.name
    function = getattr(importlib.import_module(f"{PACKAGE}.{room}.{name}"), name)
    about, settings = vars(function.about), settings_of(function)
    return Entry(**about, name=name, room=room, settings=settings, function=function)
