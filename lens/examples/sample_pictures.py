"""`sample_pictures`: pictures and films for the models that come with Headwater and those that can be added."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

from headwater.data.pictures import canvases, captions, films, scenes
from headwater.data.pictures.digits import WORDS, digits
from headwater.lens.examples.example import Example

EACH = 4  # canvases or films
MARK = "<image>"  # where the picture stands in a text


def sample_pictures(model: str) -> dict[str, Example]:
    """Held-out examples for a model by what they show, the same each time; {} for a model that is not one of these.

    >>> from headwater.lens.examples.sample_pictures import sample_pictures
    >>> list(sample_pictures("vit-digits"))[:3]
    ['zero', 'one', 'two']
    """
    rng = random.Random(0)
    if model == "vit-digits":
        pictures, labels = digits(held_out=True)
        first = [int(np.flatnonzero(labels == digit)[0]) for digit in range(10)]
        grey = [Image.fromarray(np.round(255 * pictures[place]).astype(np.uint8)) for place in first]
        return {word: Example(image=each) for word, each in zip(WORDS, grey, strict=True)}
    if model == "video-digits":
        drawn = [films.film(rng, move=move, held_out=True) for move in films.MOVES for _ in range(2)]
        return {
            f"{films.NAMES[each.label]}, {n}": Example(image=each.frames()) for n, each in enumerate(drawn)
        }
    if model in ("clip-digits", "vlm-digits", "vlm-digits-sink"):
        shown = [canvases.canvas(rng, held_out=True) for _ in range(EACH)]
        ask = f"{MARK} what stands top left ?"
        # clip-digits reads captions of one or two digits, not of four
        texts = [ask if model.startswith("vlm") else captions.caption_of(each, rng).words for each in shown]
        return {
            each.caption(): Example(text=text, image=each.picture())
            for each, text in zip(shown, texts, strict=True)
        }
    if model in ("llava-small", "dinov2-small"):
        drawn = [make(rng, held_out=True) for make in (scenes.scene, scenes.conflicting) for _ in range(2)]
        # dinov2-small, the eyes of llava-small, reads no text
        text = scenes.CHAT.format("What is in the picture?") if model == "llava-small" else None
        return {
            scenes.question("caption", each, rng)[1].rstrip("."): Example(text=text, image=each.picture())
            for each in drawn
        }
    return {}
