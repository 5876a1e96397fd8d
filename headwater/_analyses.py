"""`headwater.analyses`: the folder of analyses as a module whose attributes are the functions named like its files.

A file and its function share a name, so `analyses.rollout` must be the function whether or not the file was imported
before; the import system would put the file's module there. `analyses.catalogue()` lists all of them. The files lie in
folders by what they are about; a folder or file with an underscore in front holds what several of them use.
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
# what goes with an analysis, and is public beside it
COMPANIONS = {
    "flow_graph": "tokens.flow",
    "between": "tokens.agreement",
    "mitigation": "logits.suppressors",
    "select_circuit": "circuits.edge_attribution",
    "read_circuit": "circuits.circuit_faithfulness",
    "write_circuit": "circuits.circuit_faithfulness",
    "circuit_stability": "circuits.circuit_overlap",
    "inhibition_like": "circuits.repair",
    "cross_pairs": "_prompts.crossed_pairs",
    "subspace_edits": "circuits.align_subspace",
    "write_subspace": "circuits.align_subspace",
    "read_subspace": "circuits.align_subspace",
    "score_parts": "heads.contrastive_qk",
    "offsets_edit": "heads.fit_offsets",
    "offset_controls": "heads.fit_offsets",
    "chair": "_measures.hallucination",
    "pope": "_measures.hallucination",
    "catalogue": "_catalogue.catalogue",
}


class Analyses(ModuleType):
    """The package `headwater.analyses`."""

    def __getattr__(self, name: str) -> Any:
        home = COMPANIONS.get(name) or next(
            (f"{f.parent.name}.{name}" for f in files() if f.stem == name), None
        )
        if home is None:
            nearest = importlib.import_module("headwater.lens.errors").nearest
            raise AttributeError(f"there is no analysis {name!r}: {nearest(name, self.__dir__())}")
        return getattr(importlib.import_module(f"{NAME}.{home}"), name)

    def __dir__(self) -> list[str]:
        return sorted([f.stem for f in files()] + list(COMPANIONS))


def files() -> list[Path]:
    """The file of each analysis."""
    return sorted(FOLDER.glob("[!_]*/[!_]*.py"), key=lambda file: file.stem)


def install() -> ModuleType:
    """Enter the package where Python looks for it, before anything imports from it."""
    module = Analyses(NAME, "One file, one question; see `catalogue()`.")
    module.__path__ = [str(FOLDER)]
    spec = ModuleSpec(NAME, None, is_package=True)
    spec.submodule_search_locations = module.__path__
    module.__spec__ = spec
    module.__package__ = NAME
    return sys.modules.setdefault(NAME, module)
