"""Canvases of 16×16 pixels with real handwritten digits, bright or dim, one in each quarter or none."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from headwater.data.pictures.digits import WORDS, digits

PLACES = ("top left", "top right", "bottom left", "bottom right")
SIZE, DIM = 16, 0.45


@dataclass(frozen=True)
class Thing:
    """A digit, whether it is bright, and which picture of it."""

    digit: int
    bright: bool
    picture: int

    @property
    def words(self) -> str:
        """`bright three`"""
        return f"{'bright' if self.bright else 'dim'} {WORDS[self.digit]}"


@dataclass(frozen=True)
class Canvas:
    """What stands at each of PLACES."""

    things: tuple[Thing | None, ...]
    held_out: bool = False

    def pixels(self) -> np.ndarray:
        """float32 [16, 16], from 0 to 1."""
        found = np.zeros((SIZE, SIZE), np.float32)
        for place, thing in enumerate(self.things):
            if thing:
                grey = digits(self.held_out)[0][thing.picture]
                found[_quarter(place)] = grey * (1.0 if thing.bright else DIM)
        return found

    def picture(self) -> Image.Image:
        """The canvas in 256 greys."""
        return Image.fromarray(np.round(255 * self.pixels()).astype(np.uint8))

    def mask(self, place: int) -> np.ndarray:
        """Where the ink of one digit is, bool [16, 16]."""
        found = np.zeros((SIZE, SIZE), bool)
        thing = self.things[place]
        if thing:
            found[_quarter(place)] = digits(self.held_out)[0][thing.picture] > 0.25
        return found

    def caption(self) -> str:
        """`bright three top left , dim seven bottom right`, in the order of PLACES."""
        named = zip(self.things, PLACES, strict=True)
        return " , ".join(f"{thing.words} {place}" for thing, place in named if thing)


def canvas(rng: random.Random, *, count: int | None = None, held_out: bool = False) -> Canvas:
    """A random canvas with `count` digits, one to four where it is not given.

    >>> import random
    >>> from headwater.data.pictures.canvases import canvas
    >>> canvas(random.Random(0), count=1).caption()
    'bright zero bottom right'
    """
    labels = digits(held_out)[1]
    places = rng.sample(range(len(PLACES)), count or rng.randint(1, 4))
    things: list[Thing | None] = [None] * len(PLACES)
    for place in places:
        picture = rng.randrange(len(labels))
        things[place] = Thing(int(labels[picture]), rng.random() < 0.5, picture)
    return Canvas(tuple(things), held_out)


def _quarter(place: int) -> tuple[slice, slice]:
    half = SIZE // 2
    row, column = divmod(place, 2)
    return slice(half * row, half * (row + 1)), slice(half * column, half * (column + 1))
