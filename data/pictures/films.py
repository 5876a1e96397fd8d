"""Films of four frames: a handwritten digit stands still, or moves by one patch a frame and comes in again behind.

The digit begins at a column drawn evenly and leaves the frame on one side to enter it on the other, so its column is
drawn evenly in each frame, whatever the movement: one frame alone says nothing about it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from headwater.data.pictures.digits import WORDS, digits

FRAMES, SIZE, PATCH = 4, 16, 4
MOVES = {"still": 0, "left": -1, "right": 1}  # patches a frame
ROW = 1  # of the patch in which the digit begins, from the top
NAMES = tuple(f"{word} {move}" for word in WORDS for move in MOVES)  # the 30 classes


@dataclass(frozen=True)
class Film:
    """Which picture of a digit moves, how, and from which column of patches."""

    digit: int
    move: str
    start: int
    picture: int
    held_out: bool = False

    @property
    def label(self) -> int:
        """The place of `three left` in NAMES."""
        return NAMES.index(f"{WORDS[self.digit]} {self.move}")

    def columns(self) -> list[int]:
        """The column of patches in which the digit begins, in each frame."""
        return [(self.start + n * MOVES[self.move]) % (SIZE // PATCH) for n in range(FRAMES)]

    def pixels(self) -> np.ndarray:
        """float32 [frame, 16, 16], from 0 to 1."""
        plain = np.zeros((SIZE, SIZE), np.float32)
        plain[PATCH * ROW : PATCH * ROW + 8, :8] = digits(self.held_out)[0][self.picture]
        return np.stack([np.roll(plain, PATCH * column, 1) for column in self.columns()])

    def frames(self) -> list[Image.Image]:
        """The frames as pictures in 256 greys."""
        return [Image.fromarray(each) for each in np.round(255 * self.pixels()).astype(np.uint8)]


def film(rng: random.Random, *, move: str | None = None, held_out: bool = False) -> Film:
    """A random film, with a random movement where none is given.

    >>> import random
    >>> from headwater.data.pictures.films import film
    >>> drawn = film(random.Random(0), move="left")
    >>> drawn.pixels().shape, drawn.columns()
    ((4, 16, 16), [3, 2, 1, 0])
    """
    labels = digits(held_out)[1]
    picture = rng.randrange(len(labels))
    chosen = move or rng.choice(list(MOVES))
    return Film(int(labels[picture]), chosen, rng.randrange(SIZE // PATCH), picture, held_out)
