"""The statistics of a head's rows and keys that a corpus collects, and the bins in which they are counted."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from headwater.lens.errors import AnalysisError, nearest

BINS = 64
SUNK = 1e-3  # a row that has less than this beside its head's sinks has no roles without them
Kind = Literal["weight", "nats", "tokens"]


class Statistic(NamedTuple):
    """A number of one row of a map, or of one key: its unit and what it is."""

    kind: Kind
    about: str


STATISTICS = {
    "weight": Statistic("weight", "the row's largest weight on a key other than the first token"),
    "entropy": Statistic("nats", "entropy of the row's weights"),
    "distance": Statistic("tokens", "mean |query - key| of the row, by weight"),
    "first": Statistic("weight", "weight on the first token"),
    "self": Statistic("weight", "weight on the token itself"),
    "previous": Statistic("weight", "weight on the token before"),
    "duplicate": Statistic("weight", "weight on earlier copies of the token"),
    "induction": Statistic("weight", "weight on the tokens that follow earlier copies of the token"),
    "aside": Statistic("weight", "weight on the head's sinks, which the sink-free statistics set aside"),
    "free_self": Statistic("weight", "self, as a share of what is not on the head's sinks"),
    "free_previous": Statistic("weight", "previous, as a share of what is not on the head's sinks"),
    "free_duplicate": Statistic("weight", "duplicate, as a share of what is not on the head's sinks"),
    "free_induction": Statistic("weight", "induction, as a share of what is not on the head's sinks"),
    "received": Statistic(
        "weight", "mean weight that a key other than the first receives from the queries that see it"
    ),
}
NAMES = tuple(STATISTICS)
ROWS = NAMES[:-1]  # numbers of a row; the last one is of a key

# the six numbers of the public HeadVis pipeline, as sums over rows
HEADVIS = ("self", "previous", "entropy", "distance", "distance_squared", "induction")
HEADVIS_LEAST = 0.01  # weights below it do not count as induction there

# A sum is kept as two whole numbers, of ones and of these, so that sums of shards are equal in any order.
FRACTION = 2.0**-32
MOST_TOKENS = 2**31  # of a corpus, for which the whole numbers have room

_STEPS = np.arange(BINS + 1)
EDGES = {
    "weight": (_STEPS / BINS) ** 2,  # narrow where most weights are
    "nats": _STEPS / 4,
    "tokens": 2.0 ** (_STEPS / 3) - 1,
}
DISTANCES = np.array([0, *(2.0 ** np.arange(25))])  # edges of the bins of |query - key|


def known(name: str) -> str:
    """The name of a statistic; AnalysisError for another one."""
    if name not in NAMES:
        raise AnalysisError(f"unknown statistic {name!r}: {nearest(name, NAMES)}")
    return name


def edges(name: str) -> np.ndarray:
    """Edges [BINS + 1] of the bins in which a statistic is counted; the last bin takes all that is larger."""
    return EDGES[STATISTICS[known(name)].kind]


def parts_of(sums: np.ndarray) -> np.ndarray:
    """Sums as whole numbers, [part, …]: first the ones, then the fractions."""
    ones = np.floor(sums)
    return np.stack([ones, np.rint((sums - ones) / FRACTION)]).astype(np.int64)


def sum_of(parts: np.ndarray) -> np.ndarray:
    """The sums whose whole numbers these are."""
    return parts[0] + parts[1] * FRACTION


def bins_of(values: np.ndarray) -> np.ndarray:
    """The bin of each number, `values` [statistic, …]; -1 for NaN."""
    found = np.empty(values.shape, np.int64)
    for number, name in enumerate(NAMES):
        inside = np.searchsorted(edges(name), values[number], side="right") - 1
        found[number] = np.where(np.isnan(values[number]), -1, inside.clip(0, BINS - 1))
    return found
