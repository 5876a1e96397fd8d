"""Headwater: where attention comes from, where it goes, where it drains, and what happens when you change it.

Names are fetched when they are first used, so that `import headwater` costs next to nothing.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from headwater import _analyses

__version__ = _version("headwater")

if TYPE_CHECKING:
    from headwater.kernels.operator import AttentionMap
    from headwater.lens import recipes
    from headwater.lens.edits import (
        AblateHeads,
        BiasKeys,
        EditMLP,
        EditResidual,
        Emphasise,
        FreezeAttention,
        GroupedAttention,
        HeavyHitters,
        InjectPattern,
        Knockout,
        MoveAttention,
        Normaliser,
        OffsetHeads,
        PositionInvariant,
        Redistribute,
        ScaleHeads,
        StreamingWindow,
        Temperature,
        TowardIdentity,
        TowardUniform,
        edit_from_dict,
    )
    from headwater.lens.errors import HeadwaterError
    from headwater.lens.experiment import Experiment
    from headwater.lens.heads import Head
    from headwater.lens.load import load
    from headwater.lens.model import HookedModel
    from headwater.lens.prompts import prompt_set
    from headwater.lens.record import Record
    from headwater.lens.removal import remove_heads

_HOMES = {
    "headwater.kernels.operator": ("AttentionMap",),
    "headwater.lens.edits": (
        "AblateHeads", "BiasKeys", "EditMLP", "EditResidual", "Emphasise", "FreezeAttention", "GroupedAttention",
        "HeavyHitters", "InjectPattern", "Knockout", "MoveAttention", "Normaliser", "OffsetHeads",
        "PositionInvariant", "Redistribute", "ScaleHeads", "StreamingWindow", "Temperature", "TowardIdentity",
        "TowardUniform", "edit_from_dict",
    ),
    "headwater.lens.errors": ("HeadwaterError",),
    "headwater.lens.experiment": ("Experiment",),
    "headwater.lens.heads": ("Head",),
    "headwater.lens.load": ("load",),
    "headwater.lens.model": ("HookedModel",),
    "headwater.lens.prompts": ("prompt_set",),
    "headwater.lens.record": ("Record",),
    "headwater.lens.removal": ("remove_heads",),
}  # fmt: skip
_MODULES = {"recipes": "headwater.lens.recipes"}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

analyses = _analyses.install()

__all__ = [
    "AblateHeads",
    "AttentionMap",
    "BiasKeys",
    "EditMLP",
    "EditResidual",
    "Emphasise",
    "Experiment",
    "FreezeAttention",
    "GroupedAttention",
    "Head",
    "HeadwaterError",
    "HeavyHitters",
    "HookedModel",
    "InjectPattern",
    "Knockout",
    "MoveAttention",
    "Normaliser",
    "OffsetHeads",
    "PositionInvariant",
    "Record",
    "Redistribute",
    "ScaleHeads",
    "StreamingWindow",
    "Temperature",
    "TowardIdentity",
    "TowardUniform",
    "__version__",
    "analyses",
    "edit_from_dict",
    "load",
    "prompt_set",
    "recipes",
    "remove_heads",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _HOME:
        raise AttributeError(
            f"headwater has no {name!r}; it has {', '.join(n for n in __all__ if n[0] != '_')}"
        )
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
