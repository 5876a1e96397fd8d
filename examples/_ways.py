"""CHAIR of the captions and POPE of the answers of several ways to run a model, with the change from the first."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import headwater as hw
from headwater import analyses

Way = Callable[[list[hw.Example]], tuple[list[Any], Any]]  # edits, and the branch that is decoded against


def plain(given: list[hw.Example]) -> tuple[list[Any], Any]:
    return [], None


def compare(
    model: hw.HookedModel, ways: dict[str, Way], *,
    captions: list[hw.Example], present: Sequence[Collection[Hashable]], read: Callable[[str], Sequence[Hashable]],
    questions: list[hw.Example], right: list[bool], answer: Callable[[str], str],
    tokens: tuple[int, int], at_once: int = 1000,
) -> dict[str, list[Sequence[Hashable]]]:  # fmt: skip
    """Print the measures of each way; gives the things that its captions name.

    `read` finds the things that a text with its prompt names, `answer` the answer in it. `tokens` are those of a
    caption and of an answer.
    """

    def said(given: list[hw.Example], way: Way, length: int) -> list[str]:
        found: list[str] = []
        for some in (given[n : n + at_once] for n in range(0, len(given), at_once)):
            edits, branch = way(some)
            with model.edit(*edits):
                found += model.generate(some, length, against=branch)
        return found

    found: dict[str, list[Sequence[Hashable]]] = {}
    before: Any = None
    for name, way in ways.items():
        found[name] = named = [read(text) for text in said(captions, way, tokens[0])]
        yes = [answer(text) for text in said(questions, way, tokens[1])]
        before = before or (named, yes)
        print(name)
        for each, measures in (
            (analyses.chair(named, present, before=before[0]), ("chair_s", "chair_i", "recall")),
            (analyses.pope(yes, right, before=before[1]), ("accuracy", "yes_rate")),
        ):
            for cell in (each.sel(measure=measure) for measure in measures):
                change = f"{float(cell.change):+.3f} [{float(cell.change_low):+.3f}, {float(cell.change_high):+.3f}]"
                print(f"  {cell.measure.item()} {float(cell.value):.3f}, {change}", flush=True)
    return found
