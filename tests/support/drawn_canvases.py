"""Canvases of held-out digits for clip-digits, and its embeddings of captions by transformers alone."""

from __future__ import annotations

import random

import numpy as np
import torch

import headwater as hw
from headwater.data.pictures import canvases

PLACES = [f"a digit {place}" for place in canvases.PLACES]


def drawn(number: int, count: int) -> list[canvases.Canvas]:
    """Canvases with `count` digits each."""
    rng = random.Random(5)
    return [canvases.canvas(rng, count=count, held_out=True) for _ in range(number)]


def first(found: list[canvases.Canvas]) -> list[int]:
    """The first place of each canvas where a digit stands."""
    return [next(n for n, thing in enumerate(each.things) if thing) for each in found]


def embedded(model: hw.HookedModel, texts: list[str]) -> np.ndarray:
    """Captions at length 1, float64 [caption, d]."""
    assert model.tokenizer is not None
    given = model.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        found = model.hf.get_text_features(**given).pooler_output.double()
    return torch.nn.functional.normalize(found, dim=-1).numpy()
