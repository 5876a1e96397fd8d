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
from pathlib import Path
from typing import Any

from headwater.analyses._catalogue.analysis import About, unlabelled
from headwater.analyses._catalogue.settings import Setting, settings_of
from headwater.lens.errors import AnalysisError, nearest

PACKAGE = "headwater.analyses"


@dataclass(frozen=True, kw_only=True, repr=False)
class Entry(About):
    """One analysis: its labels, its settings and its function."""

    name: str
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
    entries = {}
    files = Path(__file__).parents[1].glob("[!_]*/[!_]*.py")
    for file in sorted(files, key=lambda file: file.stem):
        module = importlib.import_module(f"{PACKAGE}.{file.parent.name}.{file.stem}")
        function = getattr(module, file.stem)
        entries[file.stem] = Entry(
            **vars(function.about), name=file.stem, settings=settings_of(function), function=function
        )
    return entries


def entry(name: str) -> Entry:
    """The analysis called `name`. AnalysisError offers the nearest names."""
    known = catalogue()
    if name not in known:
        raise AnalysisError(f"no analysis is called {name!r}; {nearest(name, known)}")
    return known[name]
