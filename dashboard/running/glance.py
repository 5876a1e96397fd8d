"""What the first page shows of a model and its input: three answers at a glance."""

from __future__ import annotations

import numpy as np

import headwater as hw
from headwater.analyses.sinks._received_share import received_share
from headwater.dashboard.running import measure, runs
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state.state import State

KEEP = 0.4  # of the weight on the sink, where the first page asks what if it were elsewhere


def drain(run: Run) -> np.ndarray:
    """The share of attention that each token receives, mean over layers and heads, [key]."""
    share = received_share(run.record).isel(batch=0)
    return share.mean([dim for dim in share.dims if dim not in ("key", "query")], skipna=True).values


def redistribution(key: int) -> dict:
    """The edit that takes most of the weight from a token in all heads."""
    return hw.Redistribute(keys=[key], keep=KEEP).to_dict()


def without_sink(state: State, key: int) -> tuple[float | None, float | None]:
    """The measure as it is, and with the weight on a token handed to the others."""
    plain = runs.a(state)
    chosen = measure.of(state, plain)
    changed = State(**{**vars(state), "edits": [redistribution(key)], "notices": []})
    other = runs.b(changed)
    return chosen.value(plain), None if other is None else chosen.value(other)
