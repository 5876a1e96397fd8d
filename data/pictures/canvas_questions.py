"""Questions about a canvas of digits, with their answers: what stands at a place, whether a digit is there, and all."""

from __future__ import annotations

import random

from headwater.data.pictures.canvases import PLACES, Canvas
from headwater.data.pictures.digits import WORDS

KINDS = ("place", "presence", "caption")


def question(kind: str, canvas: Canvas, rng: random.Random) -> tuple[str, str]:
    """A question of one of KINDS and its answer; half of the questions of presence have the answer yes.

    >>> import random
    >>> from headwater.data.pictures.canvas_questions import KINDS, question
    >>> from headwater.data.pictures.canvases import canvas
    >>> rng = random.Random(1)
    >>> shown = canvas(rng, count=2)
    >>> for kind in KINDS:
    ...     print(*question(kind, shown, rng))
    what stands top left ? nine
    is there a six ? no
    what is there ? nine top left , eight top right
    """
    if kind == "place":
        return asked_place(canvas, rng.randrange(len(PLACES)))
    if kind == "presence":
        there = sorted({thing.digit for thing in canvas.things if thing})
        wanted = rng.random() < 0.5
        digit = rng.choice([d for d in range(len(WORDS)) if (d in there) == wanted])
        return f"is there a {WORDS[digit]} ?", "yes" if wanted else "no"
    named = zip(canvas.things, PLACES, strict=True)
    return "what is there ?", " , ".join(f"{WORDS[thing.digit]} {place}" for thing, place in named if thing)


def asked_place(canvas: Canvas, place: int) -> tuple[str, str]:
    """`what stands top left ?` and the digit's word, or `nothing`."""
    thing = canvas.things[place]
    return f"what stands {PLACES[place]} ?", WORDS[thing.digit] if thing else "nothing"


def vocabulary() -> list[str]:
    """Every word of the questions and answers."""
    texts = [f"what stands {place} ?" for place in PLACES] + [
        "what is there ?",
        "is there a ?",
        "yes no nothing ,",
    ]
    return list(dict.fromkeys(word for text in (*texts, *WORDS) for word in text.split()))
