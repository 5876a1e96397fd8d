"""segmentation against plain formulas.

Seen to fail with maps turned on the grid, with the cut at half, and with values in rising order.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn_canvases import PLACES, drawn, first
from PIL import Image

import headwater as hw
from headwater.lens.errors import AnalysisError


@pytest.fixture(scope="module")
def model() -> hw.HookedModel:
    return hw.load("clip-digits")


def test_scores_are_those_of_the_formulas(model: hw.HookedModel, tmp_path) -> None:
    found = drawn(6, 2)
    place = first(found)
    texts, masks = (
        [PLACES[n] for n in place],
        np.stack([each.mask(n) for each, n in zip(found, place, strict=True)]),
    )
    shots = [each.picture() for each in found]
    scored = hw.analyses.segmentation(
        model, shots, texts, masks.tolist(), against=PLACES, methods="text_heatmap random"
    )
    heat = hw.analyses.text_heatmap(model, shots, texts=PLACES).values
    for n, mask in enumerate(masks):
        own = torch.tensor(heat[n, place[n], 1:]).reshape(1, 1, 8, 8)
        wide = torch.nn.functional.interpolate(own, size=(16, 16), mode="bilinear")[0, 0].clamp_min(0).numpy()
        cut = wide > wide.mean()
        scores = scored.sel(attribution="text_heatmap").isel(batch=n)
        assert float(scores.pixel_accuracy) == pytest.approx((cut == mask).mean())
        ious = [
            ((cut == side) & (mask == side)).sum() / ((cut == side) | (mask == side)).sum()
            for side in (True, False)
        ]
        assert float(scores.miou) == pytest.approx(np.mean(ious))
        precision = [wide[mask][wide[mask] >= value].size / (wide >= value).sum() for value in wide[mask]]
        assert float(scores.average_precision) == pytest.approx(np.mean(precision))
    assert scored["mean"].sel(score="miou", attribution="text_heatmap") > scored["mean"].sel(
        score="miou", attribution="random"
    )
    for n, mask in enumerate(masks):
        Image.fromarray((255 * mask).astype(np.uint8)).save(tmp_path / f"{n}.png")
    again = hw.analyses.segmentation(
        model, shots, texts, str(tmp_path), against=PLACES, methods="text_heatmap"
    )
    assert np.array_equal(again.miou[0], scored.miou[0])


def test_relevance_and_rollout_are_scored_too(model: hw.HookedModel) -> None:
    found = drawn(4, 2)
    place = first(found)
    masks = [each.mask(n).tolist() for each, n in zip(found, place, strict=True)]
    scored = hw.analyses.segmentation(
        model, [each.picture() for each in found], [PLACES[n] for n in place], masks
    )
    assert scored.attribution.values.tolist() == [
        "text_heatmap",
        "raw_attention",
        "rollout",
        "relevance",
        "random",
    ]
    assert np.isfinite(scored["mean"]).all()


def test_what_does_not_fit_is_refused_by_name(model: hw.HookedModel) -> None:
    found = drawn(2, 1)
    shots, masks = [each.picture() for each in found], [np.ones((16, 16), bool).tolist()] * 2
    with pytest.raises(AnalysisError, match="all inside or all outside"):
        hw.analyses.segmentation(model, shots, PLACES[:2], masks)
    with pytest.raises(AnalysisError, match="2 pictures have 1 captions"):
        hw.analyses.segmentation(model, shots, PLACES[0], masks)
    with pytest.raises(AnalysisError, match="masks must be bool"):
        hw.analyses.segmentation(model, shots, PLACES[:2], masks[:1])


def test_captions_that_leave_nothing_are_refused_by_name(model: hw.HookedModel) -> None:
    found = drawn(2, 1)
    shots, masks = (
        [each.picture() for each in found],
        [each.mask(n) for each, n in zip(found, first(found), strict=True)],
    )
    for count in (1, 2):  # one picture, or one caption for all, has no other to be compared with
        with pytest.raises(AnalysisError, match="nothing is left of the caption 'a digit top left'"):
            hw.analyses.segmentation(model, shots[:count], PLACES[:1] * count, np.stack(masks[:count]))
    with pytest.raises(AnalysisError, match="nothing is left of the caption"):
        hw.analyses.text_heatmap(model, shots, texts=PLACES[0], against=PLACES[0])
    for methods in ("", "random random", "depth"):
        with pytest.raises(AnalysisError, match="give some of text_heatmap"):
            hw.analyses.segmentation(model, shots, PLACES[:2], np.stack(masks), methods=methods)


def test_captions_that_can_not_be_read_are_refused_by_name(model: hw.HookedModel) -> None:
    shot = drawn(1, 1)[0].picture()
    with pytest.raises(AnalysisError, match="does not know all words of the caption 'a purple digit'"):
        hw.analyses.text_heatmap(model, shot, texts=[PLACES[0], "a purple digit"])
    for words in (9, 150):  # the second one is longer than a name of a file may be
        with pytest.raises(AnalysisError, match="clip-digits reads 16; give a shorter one"):
            hw.analyses.text_heatmap(model, shot, texts="a digit " * words)
