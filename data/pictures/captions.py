"""Captions of canvases that tell a part of what is there, such as `a dim three top left`, and whether they hold."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headwater.data.pictures.canvases import PLACES, Canvas
from headwater.data.pictures.digits import WORDS

ANY = -1


@dataclass(frozen=True)
class Claim:
    """One digit of a canvas as far as it is told, each field ANY where it is not; `place` is a number in PLACES."""

    digit: int = ANY
    bright: int = ANY
    place: int = ANY

    @property
    def words(self) -> str:
        """`a dim three top left`; `a digit` where nothing is told."""
        told = [
            *(() if self.bright == ANY else (("dim", "bright")[self.bright],)),
            "digit" if self.digit == ANY else WORDS[self.digit],
            *(() if self.place == ANY else (PLACES[self.place],)),
        ]
        return " ".join(("an" if told[0] == "eight" else "a", *told))


@dataclass(frozen=True)
class Caption:
    """Claims that hold of one canvas together, of one digit each, or the number of its digits."""

    claims: tuple[Claim, ...] = ()
    count: int = ANY

    @property
    def words(self) -> str:
        """`a dim three , a seven top left` or `two digits`."""
        if self.count != ANY:
            return f"{WORDS[self.count]} digit{'s' if self.count > 1 else ''}"
        return " , ".join(claim.words for claim in self.claims)


def single() -> list[Caption]:
    """Every caption of one digit or of the number of digits, `a digit` alone left out: 168.

    >>> from headwater.data.pictures.captions import single
    >>> [caption.words for caption in single()][:6:5], len(single())
    (['a digit top left', 'a dim digit top left'], 168)
    """
    claims = [
        Claim(digit, bright, place)
        for digit, bright, place in itertools.product(range(-1, 10), range(-1, 2), range(-1, 4))
        if (digit, bright, place) != (ANY, ANY, ANY)
    ]
    return [*(Caption((claim,)) for claim in claims), *(Caption(count=count) for count in range(1, 5))]


def caption_of(found: Canvas, rng: random.Random, named: float = 0.0) -> Caption:
    """A random caption that holds: of one digit, in a fifth of the draws of two, in a tenth their number.

    A share `named` of the digits is named whatever else is told.
    """
    there = [(place, thing) for place, thing in enumerate(found.things) if thing]
    drawn = rng.random()
    if drawn < 0.1:
        return Caption(count=len(there))
    claims = []
    for place, thing in rng.sample(there, min(len(there), 2 if drawn < 0.3 else 1)):
        told = rng.randrange(1, 8)  # at least one of the three
        if named and rng.random() < named:
            told |= 1
        claims.append(
            Claim(
                thing.digit if told & 1 else ANY,
                int(thing.bright) if told & 2 else ANY,
                place if told & 4 else ANY,
            )
        )
    return Caption(tuple(claims))


def holds(captions: Sequence[Caption], canvases: Sequence[Canvas]) -> np.ndarray:
    """Which caption holds of which canvas, bool [canvas, caption]; two claims may hold of the same digit."""
    digit = np.array([[thing.digit if thing else -2 for thing in c.things] for c in canvases])
    bright = np.array([[thing.bright if thing else -2 for thing in c.things] for c in canvases])
    there = digit >= 0
    found = np.ones((len(canvases), len(captions)), bool)
    for n in range(max((len(caption.claims) for caption in captions), default=0)):
        rows = [(k, caption.claims[n]) for k, caption in enumerate(captions) if len(caption.claims) > n]
        asked = np.array([[claim.digit, claim.bright, claim.place] for _, claim in rows])
        met = there[:, None] & _met(digit[:, None], asked[:, 0]) & _met(bright[:, None], asked[:, 1])
        met &= _met(np.arange(len(PLACES))[None, None], asked[:, 2])
        found[:, [k for k, _ in rows]] &= met.any(-1)
    counts = np.array([caption.count for caption in captions])
    return found & ((counts == ANY) | (there.sum(-1)[:, None] == counts))


def _met(values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Whether a value of a place is what a caption asks for, [canvas, caption, place]."""
    return (asked[None, :, None] == ANY) | (values == asked[None, :, None])
