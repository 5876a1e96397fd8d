"""Which backend computes a forward pass, or the products and statistics of a map.

`auto` takes torch's fused kernel where it can, running sums for linear attention, and blocks of rows elsewhere. Where
statistics are wanted of a long map, or a window lies over it, it asks compiled loops first. A backend asked for by name
never falls back. `triton` runs when it is asked for.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headwater.kernels.backends.backend import Backend
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.shapes import Keys, Queries

PACKAGE = "headwater.kernels.backends"


def _found() -> dict[str, Backend]:
    """Every backend that a file of this folder, or the `backend.py` of a folder in it, defines; "auto" asks in turn."""
    here = Path(__file__).parent
    for file in [*here.glob("[!_]*.py"), *here.glob("*/backend.py")]:
        if file.stem != "choose":
            importlib.import_module(".".join([PACKAGE, *file.relative_to(here).with_suffix("").parts]))
    made = [kind() for kind in _kinds(Backend)]
    return {
        one.name: one
        for one in sorted(made, key=lambda one: (math.inf if one.turn is None else one.turn, one.name))
    }


def _kinds(base: Any) -> Iterator[Any]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


BACKENDS = _found()
NAMES = ("auto", *BACKENDS)


class Choice(NamedTuple):
    backend: Backend
    reason: str


def choose(
    q: Queries,
    k: Keys,
    rule: ScoreRule,
    edits: Sequence[WeightEdit] = (),
    backend: str = "auto",
    transposed: bool = False,
    value_width: int = 0,
    statistics: Sequence[str] | None = (),
) -> Choice:
    """The backend that will run and why. Raises ValueError where the one asked for can not do it.

    `statistics` will be asked of the map of a forward pass; None where there is none, or gradients are wanted. The rule
    is one that `prepare` has left: softmax1 comes as a learned sink, sinkhorn as a key bias.
    """
    if backend not in NAMES:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(NAMES)}")
    refusals = []
    for one in BACKENDS.values():
        if one.name != backend and (backend != "auto" or one.turn is None):
            continue
        if backend == "auto" and not one.pays(q, k, rule, statistics):
            continue
        reason = one.why_not(q, k, rule, edits, transposed, value_width)
        if reason is None:
            why = one.reason or (refusals[0] if refusals else "")
            return Choice(one, why if backend == "auto" else "asked for by name")
        refusals.append(f"{one.name} can not compute {reason}")
    raise ValueError(f"{refusals[0]}; use backend='blocked'")


def choose_for(state: MapState, transposed: bool = False) -> Backend:
    """The backend of the products and statistics of a map; `transposed` where they go from queries to keys."""
    edits = [step.edit for step in state.steps]
    return choose(state.q, state.k, state.rule, edits, state.backend, transposed, statistics=None).backend
