"""Captions and answers of vlm-digits about held-out canvases, and the digits in them that are not there."""

from __future__ import annotations

import random

import _ways
from _ways import Way, plain

import headwater as hw
from headwater.data.pictures.canvases import canvas
from headwater.data.pictures.digits import WORDS

__all__ = ["COUNT", "WORDS", "Way", "compare", "example", "plain", "rng", "there"]
COUNT = 100
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


def compare(model: hw.HookedModel, ways: dict[str, Way]) -> None:
    """Print CHAIR of the captions and POPE of the answers of each way, with the change from the first."""
    print(f"{COUNT} captions, {len(asked)} questions whether a digit is there; change from plain, 95 %")
    _ways.compare(
        model, ways, captions=[example(n, "what is there ?") for n in range(COUNT)], present=there,
        read=lambda text: [word for word in text.rpartition("?")[2].split() if word in WORDS],
        questions=[example(n, f"is there a {word} ?") for n, word, _ in asked],
        right=[right for *_, right in asked], answer=lambda text: text.rpartition("?")[2], tokens=(16, 1),
    )  # fmt: skip
