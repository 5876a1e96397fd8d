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
Way = Callable[[hw.Example], tuple[list[Any], Any]]  # edits, and the branch that is decoded against

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


def plain(given: hw.Example) -> tuple[list[Any], Any]:
    return [], None


def compare(model: hw.HookedModel, ways: dict[str, Way]) -> None:
    """Print CHAIR of the captions and POPE of the answers of each way, with the change from the first."""

    def said(n: int, question: str, way: Way, tokens: int) -> str:
        given = example(n, question)
        edits, branch = way(given)
        with model.edit(*edits):
            return model.generate(given, tokens, against=branch).rpartition("?")[2]

    print(f"{COUNT} captions, {len(asked)} questions whether a digit is there; change from plain, 95 %")
    before: Any = None
    for name, way in ways.items():
        texts = [said(n, "what is there ?", way, 16) for n in range(COUNT)]
        named = [[word for word in text.split() if word in WORDS] for text in texts]
        yes = [said(n, f"is there a {word} ?", way, 1) for n, word, _ in asked]
        before = before or (named, yes)
        captions = analyses.chair(named, there, before=before[0])
        answers = analyses.pope(yes, [right for *_, right in asked], before=before[1])
        print(name)
        for found, measures in (
            (captions, ("chair_s", "chair_i", "recall")),
            (answers, ("accuracy", "yes_rate")),
        ):
            for cell in (found.sel(measure=measure) for measure in measures):
                change = f"{float(cell.change):+.3f} [{float(cell.change_low):+.3f}, {float(cell.change_high):+.3f}]"
                print(f"  {cell.measure.item()} {float(cell.value):.3f}, {change}")
