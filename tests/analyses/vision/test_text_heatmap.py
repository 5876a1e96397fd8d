"""text_heatmap against sums of image_contributions.

Seen to fail with the mean over other texts left out.
"""

from __future__ import annotations

import numpy as np
import pytest
from drawn_canvases import PLACES, drawn, embedded, first

import headwater as hw


@pytest.fixture(scope="module")
def model() -> hw.HookedModel:
    return hw.load("clip-digits")


def test_a_map_is_what_patches_write_less_the_mean_over_texts(model: hw.HookedModel) -> None:
    shots = [each.picture() for each in drawn(3, 1)]
    heat = hw.analyses.text_heatmap(model, shots, texts=PLACES)
    parts = hw.analyses.image_contributions(model, shots, per="head_patch").contribution.values
    along = np.einsum("blhkd,td->btk", parts, embedded(model, PLACES))
    assert np.allclose(heat, along - along.mean(1, keepdims=True), atol=1e-7)
    one = hw.analyses.text_heatmap(model, shots, texts=PLACES[0])
    assert np.allclose(one[:, 0], along[:, 0], atol=1e-7)
    other = hw.analyses.text_heatmap(model, shots, texts=PLACES[0], against=PLACES[1:])
    assert np.allclose(other[:, 0], along[:, 0] - along[:, 1:].mean(1), atol=1e-7)


def test_a_place_is_found_where_its_digit_stands(model: hw.HookedModel) -> None:
    found = drawn(20, 1)
    heat = hw.analyses.text_heatmap(model, [each.picture() for each in found], texts=PLACES)
    rows, columns = (heat[f"key_{name}"].values for name in ("row", "column"))
    right = 0
    for n, place in enumerate(first(found)):
        best = int(heat.values[n, place, 1:].argmax()) + 1
        right += (rows[n, best] // 4, columns[n, best] // 4) == divmod(place, 2)
    assert right >= 18
