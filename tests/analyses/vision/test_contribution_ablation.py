"""contribution_ablation against sums of image_contributions.

Seen to fail with the class token's own share left in, and with layers ablated from the wrong end.
"""

from __future__ import annotations

import numpy as np
import pytest
from drawn_canvases import PLACES, drawn, embedded, first

import headwater as hw
from headwater.data.pictures import canvases
from headwater.data.pictures.digits import WORDS
from headwater.lens.errors import AnalysisError


@pytest.fixture(scope="module")
def model() -> hw.HookedModel:
    return hw.load("clip-digits")


def test_ablated_parts_are_means_over_pictures(model: hw.HookedModel) -> None:
    found = drawn(30, 1)
    shots, right = [each.picture() for each in found], first(found)
    curve = hw.analyses.contribution_ablation(model, shots, PLACES, right)
    parts = hw.analyses.image_contributions(model, shots)
    keys = hw.analyses.image_contributions(model, shots, per="head_patch").contribution.values
    texts, layers = embedded(model, PLACES), parts.contribution.values.sum(2)
    mlps = [str(name).startswith("mlp.") for name in parts.term.values]
    rest = parts.rest.values
    rest = rest[:, np.logical_not(mlps)].sum(1) + rest[:, mlps].sum(1).mean(0)
    own = keys[:, :, :, 0].sum(2)
    layers = layers - own + own.mean(0)

    def shares(embedding: np.ndarray) -> np.ndarray:
        return (embedding @ texts.T).argmax(-1) == np.array(right)

    assert np.array_equal(curve.right.sel(step="whole"), shares(parts.total.values))
    assert np.array_equal(curve.right.sel(step="class token"), shares(rest + layers.sum(1)))
    early = rest + layers[:, :2].mean(0).sum(0) + layers[:, 2:].sum(1)
    assert np.array_equal(curve.right.sel(step="attention ≤ 1"), shares(early))
    late = rest + layers[:, :2].sum(1) + layers[:, 2:].mean(0).sum(0)
    assert np.array_equal(curve.right.sel(step="instead attention ≥ 2"), shares(late))


def test_heads_rebuilt_from_many_texts_are_the_heads(model: hw.HookedModel) -> None:
    found = drawn(30, 1)
    shots, right = [each.picture() for each in found], [PLACES[n] for n in first(found)]
    pool = [f"a {digit} {place}" for digit in WORDS for place in canvases.PLACES]
    curve = hw.analyses.contribution_ablation(
        model, shots, PLACES, right, how="texts", texts=pool, counts=(1, 40), controls=1
    )
    assert np.array_equal(curve.right.sel(step="texts 40"), curve.right.sel(step="heads kept"))
    assert curve.attrs["chance"] == 0.25


def test_what_does_not_fit_is_refused_by_name(model: hw.HookedModel) -> None:
    shots = [each.picture() for each in drawn(2, 1)]
    with pytest.raises(AnalysisError, match="labels is not given"):
        hw.analyses.contribution_ablation(model, shots, PLACES)
    with pytest.raises(AnalysisError, match="the label 'a cat' is no class"):
        hw.analyses.contribution_ablation(model, shots, PLACES, ["a cat", "a dog"])
    with pytest.raises(AnalysisError, match="2 pictures have 1 labels"):
        hw.analyses.contribution_ablation(model, shots, PLACES, [0])


def test_one_picture_which_is_its_own_mean_is_refused() -> None:
    model, found = hw.load("clip-digits"), drawn(1, 1)
    with pytest.raises(AnalysisError, match="one picture is its own mean"):
        hw.analyses.contribution_ablation(model, found[0].picture(), PLACES, first(found))
