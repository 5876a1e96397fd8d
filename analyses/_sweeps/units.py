"""`Units`: the units of a sweep by their numbers. None of them is in memory: each follows from its number."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from headwater.analyses._sweeps.asked import Asked, Pair
from headwater.analyses._sweeps.unit import Unit
from headwater.lens.errors import SweepError
from headwater.lens.experiments.prompt import Prompt

MOST_UNITS = 10**8


@dataclass(frozen=True)
class Units:
    """Analyses × edits × seeds × ranges of layers × what is read, of which the last changes first.

    `texts` is the number of those of a corpus, which is read in the place of prompts; None where there is none.
    SweepError for too many units.
    """

    analyses: Sequence[Asked]
    edits: Sequence[str]
    seeds: Sequence[int]
    layers: Sequence[list[int]]
    prompts: Sequence[Prompt]
    pairs: Sequence[Pair]
    texts: int | None = None

    def __post_init__(self) -> None:
        units = sum(math.prod(map(len, asked.each.values())) * self._size(asked) for asked in self.analyses)
        if units > MOST_UNITS:
            raise SweepError(f"the sweep has {told(units)} units; the most is {MOST_UNITS:,}; divide it")

    def __len__(self) -> int:
        return self.firsts[-1]

    def __getitem__(self, number: int) -> Unit:
        if not 0 <= number < len(self):
            raise SweepError(f"unit {number} does not exist; the sweep has units 0 to {len(self) - 1}")
        block = bisect.bisect_right(self.firsts, number) - 1
        asked, settings = self._blocks[block]
        kind = self._kind(asked)
        rest, at = divmod(number - self.firsts[block], self._counts[kind])
        rest, layer = divmod(rest, len(self.layers) or 1)
        edit, seed = divmod(rest, len(self.seeds))
        return Unit(
            number=number,
            analysis=asked.analysis,
            settings=settings,
            kind=kind,
            at=at,
            given=self._given(kind, at),
            layers=self.layers[layer] if self.layers else None,
            edits=self.edits[edit],
            seed=self.seeds[seed],
        )

    @cached_property
    def firsts(self) -> list[int]:
        """The number of the first unit of each block, which is an analysis with its settings, and the end."""
        return [0, *itertools.accumulate(self._size(asked) for asked, _ in self._blocks)]

    def kinds(self) -> dict[str, int]:
        """What is read by some analysis, and how many there are of it."""
        read = {self._kind(asked) for asked in self.analyses}
        return {kind: count for kind, count in self._counts.items() if kind in read}

    def of(self, kind: str, at: int) -> Iterator[int]:
        """The numbers of the units that read the prompt, text or pair in that place."""
        for (asked, _), (first, end) in zip(self._blocks, itertools.pairwise(self.firsts), strict=True):
            if self._kind(asked) == kind:
                yield from range(first + at, end, self._counts[kind])

    @cached_property
    def _blocks(self) -> list[tuple[Asked, dict[str, Any]]]:
        return [(asked, settings) for asked in self.analyses for settings in asked.combinations()]

    @cached_property
    def _counts(self) -> dict[str, int]:
        own = {"text": self.texts} if self.texts is not None else {"prompt": len(self.prompts)}
        return {"": 1, "pair": len(self.pairs), **own}

    def _kind(self, asked: Asked) -> str:
        own = "prompt" if self.texts is None else "text"
        return {"model": "", "model+pairs": "pair"}.get(asked.entry.inputs, own)

    def _size(self, asked: Asked) -> int:
        """How many units one combination of settings has."""
        fixed = len(self.edits) * len(self.seeds) * (len(self.layers) or 1)
        return fixed * self._counts[self._kind(asked)]

    def _given(self, kind: str, at: int) -> dict[str, Any]:
        listed = {"prompt": self.prompts, "pair": self.pairs}.get(kind)
        return {} if listed is None else listed[at].model_dump(mode="json")


def told(number: int) -> str:
    """Also a number of so many digits that no line holds it."""
    return f"{number:,}" if number < 10**18 else "10^18 or more"
