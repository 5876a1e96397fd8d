"""`headwater.analyses`: the folder of analyses as a module whose attributes are the functions named like its files.

A file and its function share a name, so `analyses.rollout` must be the function whether or not the file was imported
before; the import system would put the file's module there. `analyses.catalogue()` lists all of them.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "headwater.analyses"
FOLDER = Path(__file__).parent / "analyses"


class Analyses(ModuleType):
    """The package `headwater.analyses`."""

    def __getattr__(self, name: str) -> Any:
        if name == "catalogue":
            return importlib.import_module(f"{NAME}._catalogue").catalogue
        if name.startswith("_") or not (FOLDER / f"{name}.py").is_file():
            raise AttributeError(f"there is no analysis {name!r}; there are {', '.join(self.__dir__())}")
        return getattr(importlib.import_module(f"{NAME}.{name}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        # what the import system stores for a file becomes its function
        if isinstance(value, ModuleType) and not name.startswith("_") and hasattr(value, name):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted(f.stem for f in FOLDER.glob("*.py") if not f.stem.startswith("_"))


def install() -> ModuleType:
    """Enter the package where Python looks for it, before anything imports from it."""
    module = Analyses(NAME, "One file, one question; see `catalogue()`.")
    module.__path__ = [str(FOLDER)]
    spec = ModuleSpec(NAME, None, is_package=True)
    spec.submodule_search_locations = module.__path__
    module.__spec__ = spec
    module.__package__ = NAME
    return sys.modules.setdefault(NAME, module)
