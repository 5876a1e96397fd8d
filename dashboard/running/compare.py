"""Two runs side by side: their tokens aligned, their answers in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import pandas as pd

from headwater.dashboard.running import runs
from headwater.dashboard.running.measure import likeliest
from headwater.dashboard.running.runs import Run


@dataclass(frozen=True)
class Aligned:
    """Positions of A and of B that belong together, in order; None on the side that lacks the token."""

    pairs: list[tuple[int | None, int | None]]

    def to_b(self, position: int | None) -> int | None:
        return next((b for a, b in self.pairs if a == position and a is not None), None)

    def to_a(self, position: int | None) -> int | None:
        return next((a for a, b in self.pairs if b == position and b is not None), None)

    def only(self, side: int) -> list[int]:
        """The positions of one side, 0 for A and 1 for B, that the other lacks."""
        return [pair[side] for pair in self.pairs if pair[1 - side] is None and pair[side] is not None]  # type: ignore[misc]


def aligned(one: Sequence[str], other: Sequence[str]) -> Aligned:
    """Equal tokens stand beside each other; as many in the place of as many others do too; the rest are insertions."""
    # what both begin and end with is most of two long texts, and matching words takes far longer than comparing them
    shorter = min(len(one), len(other))
    first = next((n for n in range(shorter) if one[n] != other[n]), shorter)
    last = next((n for n in range(shorter - first) if one[-1 - n] != other[-1 - n]), shorter - first)
    middles = (list(tokens[first : len(tokens) - last]) for tokens in (one, other))
    found: list[tuple[int | None, int | None]] = [(n, n) for n in range(first)]
    for kind, *places in SequenceMatcher(None, *middles, autojunk=False).get_opcodes():
        a0, a1, b0, b1 = (first + place for place in places)
        if kind == "equal" or a1 - a0 == b1 - b0:
            found += zip(range(a0, a1), range(b0, b1), strict=True)
        else:
            found += [(a, None) for a in range(a0, a1)] + [(None, b) for b in range(b0, b1)]
    found += zip(range(len(one) - last, len(one)), range(len(other) - last, len(other)), strict=True)
    return Aligned(found)


def change_of_map(
    one: Run, other: Run, layer: int, head: int, where: tuple[slice, slice], most: int
) -> np.ndarray | None:
    """B − A [query, key] on a window of A's map, tokens aligned; NaN at tokens that B lacks.

    None where the tokens of the window stand more than `most` apart in B.
    """
    found = runs.pattern(one, layer, head, *where)
    if (one.queries, one.keys) == (other.queries, other.keys):
        return runs.pattern(other, layer, head, *where) - found
    change = np.full(found.shape, np.nan, found.dtype)
    sides = [
        [(a - window.start, b) for a, b in aligned(*tokens).pairs
         if a is not None and b is not None and window.start <= a < window.stop]
        for tokens, window in zip(((one.queries, other.queries), (one.keys, other.keys)), where, strict=True)
    ]  # fmt: skip
    if not all(sides):
        return change
    (q, r), (k, c) = (np.array(side).T for side in sides)
    if max(r[-1] - r[0], c[-1] - c[0]) >= most:
        return None
    there = runs.pattern(other, layer, head, slice(r[0], r[-1] + 1), slice(c[0], c[-1] + 1))
    change[np.ix_(q, k)] = there[np.ix_(r - r[0], c - c[0])] - found[np.ix_(q, k)]
    return change


def table(one: Run, other: Run, places: Aligned) -> pd.DataFrame:
    """The tokens of both runs, one line per place."""
    return pd.DataFrame(
        [
            {
                "A": a, "token A": "" if a is None else one.keys[a], "B": b,
                "token B": "" if b is None else other.keys[b],
                "": _mark(None if a is None else one.keys[a], None if b is None else other.keys[b]),
            }
            for a, b in places.pairs
        ]
    ).astype({"A": "Int64", "B": "Int64"})  # fmt: skip


def _mark(one: str | None, other: str | None) -> str:
    if one is None or other is None:
        return "only in B" if one is None else "only in A"
    return "" if one == other else "another token"


def answers(run: Run, count: int = 10) -> pd.DataFrame:
    """The likeliest tokens or classes of a run."""
    known = run.log_probabilities()
    ids = likeliest(run, count)
    return pd.DataFrame(
        {
            "answer": [run.label(n) for n in ids],
            "p": np.exp(known[ids]),
            "log p": known[ids],
            "rank": range(1, len(ids) + 1),
        }
    )


def shapes(one: Run, other: Run) -> str:
    """What is told where the runs have other layers or heads; empty where they have the same."""
    sides = [(len(run.layers), run.n_heads) for run in (one, other)]
    if sides[0] == sides[1]:
        return ""
    (layers, heads), (others, more) = sides
    return (
        f"{one.name} has {layers} layers × {heads} heads, {other.name} {others} × {more}: heads of the same number "
        "have nothing in common, and what one model lacks is left out"
    )
