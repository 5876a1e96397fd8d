"""Prompts such as `dim seven right and bright three left`, the 8×16 pixels they tell of, and what a drawing shows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from headwater.data.pictures.canvases import DIM
from headwater.data.pictures.digits import WORDS, digits

BRIGHTNESS, PLACES, AND = ("dim", "bright"), ("left", "right"), "and"
ROWS, COLUMNS = 8, 16
LONGEST = 8  # tokens: the first one, three words, "and", three words
EMPTY = 0.25  # the brightest pixel of a half in which nothing stands is darker
Reader = Callable[
    [np.ndarray], np.ndarray
]  # [picture, 8, 8], each as bright as a bright one, to digits [picture]


@dataclass(frozen=True)
class Thing:
    """A digit, whether it is bright, and its place: 0 left, 1 right."""

    digit: int
    bright: bool
    place: int

    @property
    def words(self) -> str:
        return f"{BRIGHTNESS[self.bright]} {WORDS[self.digit]} {PLACES[self.place]}"


def draw(rng: random.Random, count: int | None = None) -> tuple[Thing, ...]:
    """One thing or, twice as often, two, in random order and at different places."""
    places = rng.sample((0, 1), count or rng.choice((1, 2, 2)))
    return tuple(Thing(rng.randrange(10), rng.random() < 0.5, place) for place in places)


def prompt(things: tuple[Thing, ...]) -> str:
    return f" {AND} ".join(thing.words for thing in things)


def things_of(text: str) -> tuple[Thing, ...]:
    """What a prompt tells of; the other way round from `prompt`.

    >>> from headwater.data.pictures.drawings import things_of
    >>> things_of("dim seven right")
    (Thing(digit=7, bright=False, place=1),)
    """
    told = [each.split() for each in text.split(f" {AND} ")]
    return tuple(Thing(WORDS.index(d), bool(BRIGHTNESS.index(b)), PLACES.index(p)) for b, d, p in told)


def pixels(things: tuple[Thing, ...], rng: random.Random, held_out: bool = False) -> np.ndarray:
    """A picture of real digits for the things, float32 [8, 16], from 0 to 1."""
    pictures, labels = digits(held_out)
    found = np.zeros((ROWS, COLUMNS), np.float32)
    for thing in things:
        chosen = rng.choice(np.flatnonzero(labels == thing.digit).tolist())
        found[:, half(thing.place)] = pictures[chosen] * (1.0 if thing.bright else DIM)
    return found


def half(place: int) -> slice:
    return slice(8 * place, 8 * place + 8)


def right(pictures: np.ndarray, told: Sequence[tuple[Thing, ...]], reader: Reader) -> dict[str, np.ndarray]:
    """Whether the things told stand in the pictures [picture, 8, 16], from 0 to 1: digit, brightness, place, all three.

    bool [thing] each, the things of the first picture first.

    `place`: something stands in the half that was named. The others are read there.
    """
    parts = np.stack(
        [p[:, half(thing.place)] for p, things in zip(pictures, told, strict=True) for thing in things]
    )
    things = [thing for each in told for thing in each]
    top = parts.max((1, 2))
    place = top > EMPTY
    digit = place & (
        reader(parts / np.maximum(top, EMPTY)[:, None, None]) == [thing.digit for thing in things]
    )
    brightness = place & ((top > (1 + DIM) / 2) == [thing.bright for thing in things])
    return {"digit": digit, "brightness": brightness, "place": place, "all": digit & brightness}


def empty(pictures: np.ndarray, told: Sequence[tuple[Thing, ...]]) -> np.ndarray:
    """For each picture of one thing, whether its other half is empty; bool."""
    pairs = [(p, t[0]) for p, t in zip(pictures, told, strict=True) if len(t) == 1]
    return np.array([p[:, half(1 - thing.place)].max() <= EMPTY for p, thing in pairs], bool)
