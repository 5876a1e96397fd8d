"""Which backend computes a forward pass, or the products and statistics of a map.

`auto` takes torch's fused kernel where it can, running sums for linear attention, and blocks of rows elsewhere; a
backend asked for by name never falls back. `triton` runs when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from headwater.kernels.backends.backend import Backend
from headwater.kernels.backends.blocked import Blocked
from headwater.kernels.backends.flash import Flash
from headwater.kernels.backends.linear import Running
from headwater.kernels.backends.reference import Reference
from headwater.kernels.backends.triton.backend import Triton
from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule

# in the order in which "auto" asks them
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Flash(), Triton(), Running(), Blocked(), Reference())
}
NAMES = ("auto", *BACKENDS)


class Choice(NamedTuple):
    backend: Backend
    reason: str


def choose(
    q: Tensor,
    k: Tensor,
    rule: ScoreRule,
    edits: Sequence[WeightEdit] = (),
    backend: str = "auto",
    transposed: bool = False,
    value_width: int = 0,
) -> Choice:
    """The backend that will run and why. Raises ValueError where the one asked for can not do it.

    The rule is one that `prepare` has left: softmax1 comes as a learned sink, sinkhorn as a key bias.
    """
    if backend not in NAMES:
        raise ValueError(f"unknown backend {backend!r}; there are {', '.join(NAMES)}")
    refusals = []
    for one in BACKENDS.values():
        if one.name != backend and not (backend == "auto" and one.automatic):
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
    return choose(state.q, state.k, state.rule, edits, state.backend, transposed).backend
