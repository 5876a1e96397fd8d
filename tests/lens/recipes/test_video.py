"""Space–time knockout against masks that are made place by place, and against transformers' own eager attention."""

from __future__ import annotations

import pytest
import torch

import headwater as hw
from headwater.lens.loading import zoo

FILM = torch.randn(2, 4, 3, 16, 24, generator=torch.Generator().manual_seed(0))  # 2 frames of 2 × 3 patches


@pytest.fixture(scope="module")
def model() -> hw.HookedModel:
    torch.manual_seed(0)
    config = zoo.KNOWN["videomae"].config | {"image_size": (16, 24)}
    import transformers

    return hw.load(transformers.VideoMAEModel(transformers.VideoMAEConfig(**config)).eval())


def seen_by_hand(hide: str, reach: int) -> torch.Tensor:
    places = [(f, r, c) for f in range(2) for r in range(2) for c in range(3)]
    seen = torch.ones(12, 12, dtype=torch.bool)
    for i, (f, r, c) in enumerate(places):
        for j, (g, s, d) in enumerate(places):
            here = abs(r - s) <= reach and abs(c - d) <= reach
            hidden = {"other_frames": f != g, "same_places": f != g and here, "own_frame": f == g and i != j}
            seen[i, j] = not hidden[hide]
    return seen


@pytest.mark.parametrize("hide", ["other_frames", "same_places", "own_frame"])
def test_what_is_hidden_has_no_weight_and_the_rest_keeps_its_proportions(model, hide):
    plain = model.record(pixel_values=FILM).pattern(0)
    with model.edit(*hw.recipes.space_time_knockout(model, None, pixel_values=FILM, hide=hide, reach=0)):
        found = model.record(pixel_values=FILM).pattern(0)
    wanted = plain.double() * seen_by_hand(hide, 0)
    torch.testing.assert_close(found.double(), wanted / wanted.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)


def test_reach_widens_the_place(model):
    seen = hw.recipes.space_time_knockout(model, None, pixel_values=FILM, hide="same_places")[0].rule
    assert torch.equal(seen, seen_by_hand("same_places", 1))


def test_the_control_hides_as_many_and_never_a_patch_from_itself(model):
    one, other = (
        hw.recipes.space_time_knockout(model, None, pixel_values=FILM, hide="random", seed=n)[0].rule
        for n in (0, 1)
    )
    assert (~one).sum(-1).tolist() == [6] * 12
    assert one.diagonal().all()
    assert not torch.equal(one, other)


def test_frames_that_see_no_other_are_the_frames_alone(model):
    """Without attention between frames the outputs of one frame do not move with another frame."""
    other = FILM.clone()
    other[:, 2:] = other[:, 2:].flip(-1)
    with model.edit(*hw.recipes.space_time_knockout(model, None, pixel_values=FILM)):
        first, second = (model.embeddings(pixel_values=film)[:, :6] for film in (FILM, other))
    torch.testing.assert_close(first, second)
    free = [model.embeddings(pixel_values=film)[:, :6] for film in (FILM, other)]
    assert not torch.allclose(*free, atol=1e-4)


def test_what_is_no_video_is_refused_in_a_line():
    picture = hw.load(zoo.build("vit"))
    with pytest.raises(hw.HeadwaterError, match="no grid of several frames"):
        hw.recipes.space_time_knockout(picture, None, pixel_values=zoo.inputs("vit")["pixel_values"])
    with pytest.raises(hw.HeadwaterError, match="hide is one of"):
        hw.recipes.space_time_knockout(picture, None, hide="frames")
