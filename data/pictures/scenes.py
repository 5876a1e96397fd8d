"""Scenes of coloured shapes and handwritten digits on a 2×2 grid, with words and questions about them.

Two pairs of things stand together in most training scenes, so that a language prior can be learned, and a scene can
be drawn where the picture disagrees with it. What stands in a scene is known exactly.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from headwater.data.pictures.digits import digits

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 210, 50)}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = {"three": 3, "seven": 7}
KINDS = (*SHAPES, *NUMBERS)
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIZE = 112
# The first of a pair is followed by the second in 80 % of the training scenes that have it, whatever else stands there.
PAIRS = {("red", "circle"): ("blue", "square"), ("green", "triangle"): ("yellow", "cross")}
PRIOR = 0.8
CHAT = "<|im_start|>user\n<image>\n{}<|im_end|>\n<|im_start|>assistant\n"  # llava-small reads a question so

Thing = tuple[str, str]  # colour, kind
THINGS: tuple[Thing, ...] = tuple((colour, kind) for colour in COLOURS for kind in KINDS)


@dataclass(frozen=True)
class Scene:
    """What stands at which place, and the seed of its picture."""

    things: tuple[Thing | None, ...]  # one for each of PLACES
    seed: int
    held_out: bool = False  # digits of the held-out people's pictures

    @property
    def present(self) -> set[Thing]:
        return {thing for thing in self.things if thing}

    def picture(self) -> Image.Image:
        """The scene as RGB, 112×112 pixels: a grey ground with noise, one thing in each quarter or none."""
        rng = np.random.default_rng([self.seed, 7])
        ground = rng.normal(rng.uniform(90, 165), 6, (SIZE, SIZE, 1)).repeat(3, 2)
        image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
        for place, thing in enumerate(self.things):
            if thing:
                _draw(image, place, thing, rng, self.held_out)
        return image


def scene(rng: random.Random, *, prior: float = PRIOR, held_out: bool = False) -> Scene:
    """A scene of two or three different things; the second of a pair stands with its first with chance `prior`."""
    count = rng.choice((2, 2, 3))
    chosen = [rng.choice(THINGS) if rng.random() > 0.25 else rng.choice(list(PAIRS))]
    partner = PAIRS.get(chosen[0])
    if partner and rng.random() < prior:
        chosen.append(partner)
    kept = {*PAIRS, *PAIRS.values()}  # they come by the prior alone, so that its rate is exact
    while len(chosen) < count:
        other = rng.choice(THINGS)
        if other not in chosen and (other not in kept or rng.random() < 0.15) and other != partner:
            chosen.append(other)
    for first, second in PAIRS.items():  # one more first of a pair must not come without its rate
        if first in chosen[1:] and second not in chosen:
            chosen[chosen.index(first)] = next(t for t in THINGS if t not in chosen and t not in kept)
    places = rng.sample(range(len(PLACES)), len(chosen))
    things: list[Thing | None] = [None] * len(PLACES)
    for place, thing in zip(places, chosen, strict=True):
        things[place] = thing
    return Scene(tuple(things), rng.randrange(2**31), held_out)


def conflicting(rng: random.Random, held_out: bool = True) -> Scene:
    """A scene with the first of a pair and without its second: here the prior is wrong."""
    while True:
        found = scene(rng, prior=0.0, held_out=held_out)
        if any(first in found.present for first in PAIRS):
            return found


def said(thing: Thing) -> str:
    return f"a {thing[0]} {thing[1]}"


def question(name: str, scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question of a kind (`caption`, `presence`, `place` or `colour`) and its answer."""
    present = [thing for thing in scene.things if thing]
    if name == "caption":
        ordered = sorted(present, key=lambda thing: (thing not in PAIRS, THINGS.index(thing)))
        return "What is in the picture?", listed(ordered)
    if name == "place":
        place = rng.randrange(len(PLACES))
        thing = scene.things[place]
        return f"What is at the {PLACES[place]}?", said(thing).capitalize() + "." if thing else "Nothing."
    if name == "colour":
        kinds = [kind for _, kind in present]
        colour, kind = rng.choice([t for t in present if kinds.count(t[1]) == 1] or present)
        return f"What color is the {kind}?", colour.capitalize() + "."
    asked = rng.choice(present) if rng.random() < 0.5 else absent(scene, rng)
    return f"Is there {said(asked)}?", "Yes." if asked in scene.present else "No."


def absent(scene: Scene, rng: random.Random, how: str = "any") -> Thing:
    """Something that is not there: `random`, `popular` (of a pair), `near` (same colour or kind), or `any` of both."""
    others = [thing for thing in THINGS if thing not in scene.present]
    if how == "popular":
        return rng.choice([t for t in others if t in {*PAIRS, *PAIRS.values()}] or others)
    if how == "near" or (how == "any" and rng.random() < 0.5):
        colours, kinds = zip(*scene.present, strict=True)
        return rng.choice([t for t in others if t[0] in colours or t[1] in kinds])
    return rng.choice(others)


def listed(things: Sequence[Thing]) -> str:
    """`A red circle, a blue square.`"""
    return ", ".join(map(said, things)).capitalize() + "."


def mentioned(text: str) -> list[Thing]:
    """The things that a caption names, in its order."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    pairs = itertools.pairwise(words)
    return [(first, second) for first, second in pairs if first in COLOURS and second in KINDS]


def _draw(image: Image.Image, place: int, thing: Thing, rng: np.random.Generator, held_out: bool) -> None:
    cell, colour = SIZE // 2, COLOURS[thing[0]]
    size = int(rng.integers(34, 47))
    left, top = (int(rng.integers(3, cell - size - 2)) for _ in range(2))
    at = (place % 2 * cell + left, place // 2 * cell + top)
    mask = Image.new("L", (4 * size, 4 * size))
    pen, end = ImageDraw.Draw(mask), 4 * size - 1
    if thing[1] == "circle":
        pen.ellipse((0, 0, end, end), fill=255)
    elif thing[1] == "square":
        pen.rectangle((0.06 * end, 0.06 * end, 0.94 * end, 0.94 * end), fill=255)
    elif thing[1] == "triangle":
        pen.polygon([(end / 2, 0), (0, end), (end, end)], fill=255)
    elif thing[1] == "cross":
        pen.rectangle((0.33 * end, 0, 0.67 * end, end), fill=255)
        pen.rectangle((0, 0.33 * end, end, 0.67 * end), fill=255)
    else:
        pictures, labels = digits(held_out)
        grey = rng.choice(pictures[labels == NUMBERS[thing[1]]])
        mask = Image.fromarray((255 * grey).astype(np.uint8)).resize(mask.size, Image.Resampling.BICUBIC)
    image.paste(colour, at, mask.resize((size, size), Image.Resampling.LANCZOS))
