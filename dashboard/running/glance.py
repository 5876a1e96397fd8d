"""What the first page shows of the sink of an input: which token it is, and the measure without it.

The token and the edit are those that the page Sinks begins with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headwater.analyses._catalogue.catalogue import entry
from headwater.dashboard.running import measure, runs, sinks
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state.state import State


@dataclass(frozen=True)
class Sink:
    """The token at `place`; `heads` give it more than the limit, and `share` is what each token receives, [key]."""

    place: int
    heads: list[str]
    limit: float
    share: np.ndarray

    @property
    def edit(self) -> dict[str, Any]:
        """The edit that hands most of what these heads put on the token to others."""
        return sinks.redistribution([self.place], self.heads)


def sink(run: Run) -> Sink:
    limit = float(entry("sink_rate").setting("threshold").default)
    found = sinks.shares(run)
    (place,) = sinks.first_keys(found, limit, sinks.LEAST)
    return Sink(place, sinks.above(found, [place], limit), limit, found.overall())


def without(state: State, edit: dict[str, Any]) -> tuple[float | None, float | None]:
    """The measure as it is, and under an edit."""
    plain = runs.a(state)
    chosen = measure.of(state, plain)
    other = runs.b(replace(state, edits=[state.on_part(edit)], b_text=None, b_model=None, notices=[]))
    return chosen.value(plain), None if other is None else chosen.value(other)
