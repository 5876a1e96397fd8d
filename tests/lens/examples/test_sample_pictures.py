"""Sample pictures (`sample_pictures.py`): what they are called is what they show."""

from __future__ import annotations

import numpy as np

import headwater as hw
from headwater.lens.examples.sample_pictures import sample_pictures


def test_digits_are_read_as_they_are_called():
    model = hw.load("vit-digits")
    samples = sample_pictures("vit-digits")
    read = [model.classes[int(model(each).argmax())] for each in samples.values()]
    assert np.mean([a == b for a, b in zip(read, samples, strict=True)]) >= 0.9


def test_every_kind_has_pictures_and_a_text_where_one_is_read():
    assert all(len(each.images) == 4 for each in sample_pictures("video-digits").values())
    assert all("<image>" in each.text for each in sample_pictures("vlm-digits-sink").values())
    scenes = sample_pictures("llava-small")
    assert len(scenes) == 4
    assert all(each.text.count("<image>") == len(each.images) == 1 for each in scenes.values())
    eyes = sample_pictures("dinov2-small")
    assert list(eyes) == list(scenes)
    assert all(each.text is None and len(each.images) == 1 for each in eyes.values())
    for other in ("tasks-4l", "vit-digits-mine", "clip-digits/checkpoint", "vlm-digits-2"):
        assert sample_pictures(other) == {}


def test_a_caption_fits_the_model_and_tells_a_part_of_what_is_there():
    samples = sample_pictures("clip-digits")
    assert hw.load("clip-digits")(list(samples.values())).isfinite().all()
    for name, each in samples.items():
        told = set(each.text.split()) - {"a", "an", ","}
        assert told <= {*name.split(), "digit", "digits", "one", "two", "three", "four"}
