"""What the scripts on `t2i-digits` share: prompts, and `vit-digits` as the judge of what was drawn."""

import random

import numpy as np
import torch

import headwater as hw
from headwater.data.pictures import drawings

JUDGE = hw.load("vit-digits")


def prompts(count, seed, things=1):
    """Different prompts, each of one thing or two."""
    rng, found = random.Random(f"page {seed}"), {}
    while len(found) < count:
        found[drawings.prompt(drawings.draw(rng, things))] = None
    return list(found)


def probabilities(parts):
    """What the judge says of pictures [picture, 8, 8] from 0 to 1: [picture, class]."""
    pixels = (torch.from_numpy(np.asarray(parts, np.float32))[:, None] - 0.5) / 0.5
    return JUDGE(pixel_values=pixels).softmax(-1).detach().double().numpy()


def judge(concept):
    """A measure: the share of what a prompt tells of that a picture shows; "digit", "brightness", "place" or "all"."""

    def shown(pictures, texts):
        told = [drawings.things_of(text) for text in texts]
        pixels = np.stack([np.asarray(picture, np.float32) / 255 for picture in pictures])
        right = drawings.right(pixels, told, lambda parts: probabilities(parts).argmax(-1))[concept]
        ends = np.cumsum([len(things) for things in told])
        return np.array([part.mean() for part in np.split(right.astype(float), ends[:-1])])

    return shown


def certainty(pictures, texts):
    """A measure: the judge's mean probability of the digits that a prompt tells of, at their places."""
    found = []
    for picture, text in zip(pictures, texts, strict=True):
        pixels, things = np.asarray(picture, np.float32) / 255, drawings.things_of(text)
        parts = np.stack([pixels[:, drawings.half(thing.place)] for thing in things])
        parts = parts / np.maximum(parts.max((1, 2), keepdims=True), drawings.EMPTY)
        found.append(probabilities(parts)[range(len(things)), [thing.digit for thing in things]].mean())
    return found
