"""`Backend`: the interface to one way of computing attention, and products and statistics of its maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Bool
from torch import Tensor

from headwater.kernels.edits.weights import WeightEdit, WeightStep
from headwater.kernels.rules.map_state import MapState
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.shapes import (
    AtKeys,
    AtQueries,
    Groups,
    Keys,
    Output,
    OverKeys,
    OverQueries,
    PerKey,
    PerQuery,
    Queries,
    Values,
)  # fmt: skip


class Pass(NamedTuple):
    """What a forward pass leaves: z, lse, the weight edits with their factors, statistics.

    On a row that sees no key z is zero and lse -inf.
    """

    z: Output
    lse: PerQuery
    steps: tuple[WeightStep, ...]
    found: dict[str, Tensor]


class Backend(Protocol):
    """A new backend is one file of this folder with a class that inherits from this one; `choose.py` finds it."""

    name: ClassVar[str]
    # when "auto" asks it, lowest first; None: it is taken by name alone. `reason` is what the choice then says
    turn: ClassVar[int | None] = None
    reason: ClassVar[str] = ""
    # whether it takes what `prepare` leaves of queries, keys and rule, or the rule as it was given
    prepared: ClassVar[bool] = True
    # the backend of the products and statistics of a map whose forward pass was here
    of_map: ClassVar[str] = "auto"
    # statistics that cost its forward pass little
    free: ClassVar[Sequence[str]] = ()

    def pays(self, q: Queries, k: Keys, rule: ScoreRule, statistics: Sequence[str] | None) -> bool:
        """Whether "auto" asks it at all, where the caller will ask for these statistics of the map; None where there is
        no forward pass, or gradients are wanted of it."""
        return True

    def why_not(
        self, q: Queries, k: Keys, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        transposed: bool = False, value_width: int = 0,
    ) -> str | None:  # fmt: skip
        """What it can not compute here, in words that follow "can not compute"; None where it can.

        The rule is one that `prepare` has left. `transposed` asks for `scatter`.
        """
        ...

    def attend(
        self, q: Queries, k: Keys, v: Values, rule: ScoreRule, edits: Sequence[WeightEdit] = (),
        statistics: Sequence[str] = (),
    ) -> Pass:  # fmt: skip
        """z, and with it those of the `statistics` that are `free`."""
        ...

    def gather(self, state: MapState, x: OverKeys) -> AtQueries:
        """`P @ x`."""
        ...

    def scatter(self, state: MapState, y: OverQueries) -> AtKeys:
        """`P^T @ y`."""
        ...

    def received(
        self, state: MapState, queries: Bool[Tensor, "#batch query"] | None, later: tuple[int, int] | None
    ) -> PerKey | None:
        """Column sums of the rows `queries`; None where blocks are as good.

        `later=(near, far)` counts the queries that stand near to far positions after the key, both ends included.
        """
        return None

    def statistics(
        self, state: MapState, names: Sequence[str], groups: Groups | None, window: int
    ) -> dict[str, Tensor] | None:
        """The named statistics with the conventions of kernels/maps/statistics.py; None where blocks are as good."""
        return None

    def _column_sums(self, state: MapState, queries: Bool[Tensor, "#batch query"] | None) -> PerKey:
        """`received` as a product with one column of ones."""
        queries = torch.ones(1, state.shape[2]) if queries is None else queries.float()
        ones = queries[:, None, :, None].to(state.q.device)
        return self.scatter(state, ones.expand(state.shape[0], -1, -1, -1))[..., 0]
