"""Held-out scenes that disagree with the prior of llava-small, and questions about them."""

from __future__ import annotations

import random

import _ways

import headwater as hw
from headwater.data.pictures import scenes

COUNT = 20
rng = random.Random("ways")
shown = [scenes.conflicting(rng) for _ in range(COUNT)]
missing = [next(b for a, b in scenes.PAIRS.items() if a in s.present and b not in s.present) for s in shown]
right = [
    n % 2 == 0 for n in range(COUNT)
]  # every other scene is asked for what is there, the rest for what is not
asked = [rng.choice(sorted(s.present)) if r else m for s, m, r in zip(shown, missing, right, strict=True)]


def ask(questions: list[str]) -> list[hw.Example]:
    texts = [scenes.CHAT.format(each) for each in questions]
    return [hw.Example(text=text, image=s.picture()) for text, s in zip(texts, shown, strict=True)]


def compare(model: hw.HookedModel, ways: dict[str, _ways.Way]) -> dict[str, list[bool]]:
    """Print CHAIR and POPE of each way; gives which captions of each name the missing partner."""
    print(f"{COUNT} captions and {COUNT} questions of presence; change from plain, 95 %")
    found = _ways.compare(
        model, ways, captions=ask(["What is in the picture?"] * COUNT), present=[s.present for s in shown],
        read=scenes.mentioned, questions=ask([f"Is there {scenes.said(thing)}?" for thing in asked]),
        right=right, answer=lambda text: text.rpartition("assistant\n")[2], tokens=(24, 3), at_once=20,
    )  # fmt: skip
    return {
        way: [m in things for m, things in zip(missing, said, strict=True)] for way, said in found.items()
    }
