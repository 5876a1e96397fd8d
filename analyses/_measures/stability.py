"""How much of a circuit is found again: its members beside those of circuits found from other draws or seeds.

Two circuits share `|a ∩ b| / |a ∪ b|` of their members; chance is that of random sets of their sizes, which need not be
connected. Attributes of a result say it: `stability`, `stability_by_chance`, and `stability_over` what it is a mean.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from scipy.stats import hypergeom

EMPTY = "nothing is left in the circuit"


def told_of(own: Collection[Any], others: Sequence[Collection[Any]], whole: int, over: str) -> dict[str, Any]:
    """The attributes of a circuit with these edges or heads, beside those of others, out of `whole` in the model."""
    own, sets = set(own), [set(other) for other in others]
    if not own:
        return unknown(EMPTY)
    shares = [len(own & other) / len(own | other) for other in sets]
    size = round(float(np.mean([len(other) for other in sets])))
    found = {"stability": float(np.mean(shares)), "stability_by_chance": chance(whole, len(own), size)}
    return {**found, "stability_over": over}


def unknown(why: str) -> dict[str, Any]:
    """The attributes of a circuit that nothing can be redrawn of."""
    return {"stability": f"unknown: {why}", "stability_by_chance": "", "stability_over": ""}


def chance(whole: int, a: int, b: int) -> float:
    """The expected share of two random sets of these sizes, not both empty, out of `whole`."""
    common = np.arange(min(a, b) + 1)
    return float((hypergeom.pmf(common, whole, a, b) * common / (a + b - common)).sum())
