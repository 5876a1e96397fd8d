"""The shipped video model reads fresh films as its metrics.json says, and one frame tells nothing of the movement."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

import headwater as hw
from headwater.data.pictures import films
from headwater.data.pictures.digits import digits
from headwater.lens.models.embedded import check_embedded

FOLDER = Path(__file__).parents[2] / "data" / "models" / "video-digits"
FIGURES = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))["held_out"]


def test_fresh_films_are_read_as_well_as_the_metrics_say():
    check_embedded("video-digits")
    model, rng, count = hw.load("video-digits"), random.Random(77), 300
    drawn = [films.film(rng, held_out=True) for _ in range(count)]
    found = model(model.to_tokens([hw.Example(image=film.frames()) for film in drawn])).argmax(-1).numpy()
    labels = np.array([film.label for film in drawn])
    moves = len(films.MOVES)
    right = {"digit": found // moves == labels // moves, "move": found % moves == labels % moves}
    for name, share in {name: each.mean() for name, each in right.items()}.items():
        error = (FIGURES[name] * (1 - FIGURES[name]) / count) ** 0.5
        assert abs(share - FIGURES[name]) <= 4 * error + 2 / count, name
        assert FIGURES[name] >= 0.95
    assert model.classes[drawn[0].label] == films.NAMES[drawn[0].label]


@pytest.mark.parametrize("frame", range(films.FRAMES))
def test_one_frame_says_nothing_about_the_movement(frame):
    """The columns of a frame are the same set for every movement, each as often as the others."""
    for move in films.MOVES:
        columns = [films.Film(3, move, start, 0).columns()[frame] for start in range(4)]
        assert sorted(columns) == [0, 1, 2, 3]


def test_pixels_are_the_digit_moved_by_a_patch_a_frame():
    film = films.Film(3, "right", 3, 5, held_out=True)
    pixels = film.pixels()
    digit = digits(True)[0][5]
    np.testing.assert_array_equal(pixels[1, 4:12, :8], digit)  # column 3, then in again at 0
    np.testing.assert_array_equal(np.roll(pixels[0], 4, 1), pixels[1])
