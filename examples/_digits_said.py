"""Captions and answers of vlm-digits about held-out canvases, and the digits in them that are not there."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import headwater as hw
from headwater import analyses
from headwater.data.pictures.canvases import canvas
from headwater.data.pictures.digits import WORDS

COUNT = 100
Way = Callable[[list[hw.Example]], tuple[list[Any], Any]]  # edits, and the branch that is decoded against

rng = random.Random(9)
shown = [canvas(rng, held_out=True) for _ in range(COUNT)]
there = [{WORDS[thing.digit] for thing in each.things if thing} for each in shown]
asked = [
    (n, rng.choice(sorted(pool)), right)  # of each canvas a digit that is there and one that is not
    for n, words in enumerate(there)
    for right, pool in ((True, words), (False, {*WORDS} - words))
]


def example(n: int, question: str) -> hw.Example:
    return hw.Example(text=f"<image> {question}", image=shown[n].picture())


def plain(given: list[hw.Example]) -> tuple[list[Any], Any]:
    return [], None


def compare(model: hw.HookedModel, ways: dict[str, Way]) -> None:
    """Print CHAIR of the captions and POPE of the answers of each way, with the change from the first."""

    def said(given: list[hw.Example], way: Way, tokens: int) -> list[str]:
        edits, branch = way(given)
        with model.edit(*edits):
            return [text.rpartition("?")[2] for text in model.generate(given, tokens, against=branch)]

    print(f"{COUNT} captions, {len(asked)} questions whether a digit is there; change from plain, 95 %")
    captions = [example(n, "what is there ?") for n in range(COUNT)]
    questions = [example(n, f"is there a {word} ?") for n, word, _ in asked]
    before: Any = None
    for name, way in ways.items():
        named = [[word for word in text.split() if word in WORDS] for text in said(captions, way, 16)]
        yes = said(questions, way, 1)
        before = before or (named, yes)
        found = analyses.chair(named, there, before=before[0])
        answers = analyses.pope(yes, [right for *_, right in asked], before=before[1])
        print(name)
        for each, measures in (
            (found, ("chair_s", "chair_i", "recall")),
            (answers, ("accuracy", "yes_rate")),
        ):
            for cell in (each.sel(measure=measure) for measure in measures):
                change = f"{float(cell.change):+.3f} [{float(cell.change_low):+.3f}, {float(cell.change_high):+.3f}]"
                print(f"  {cell.measure.item()} {float(cell.value):.3f}, {change}")
