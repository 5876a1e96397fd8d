"""The page of models that see: its figures hold the numbers of the analyses, and uploads are bounded."""

from __future__ import annotations

import io

import numpy as np
import pytest
from opened_app import figure, opened, values
from PIL import Image

import headwater as hw
from headwater.dashboard import runs, seen
from headwater.lens.errors import PromptError
from headwater.lens.examples.sample_pictures import sample_pictures
from headwater.lens.models import embedded

pytestmark = pytest.mark.usefixtures("offered")


@pytest.fixture(scope="module")
def record() -> hw.Record:
    return hw.load("vit-digits").record(sample_pictures("vit-digits")["zero"])


@pytest.fixture
def app(monkeypatch):
    shipped = {name: each for name, each in embedded.embedded().items() if name in ("vit-digits", "tasks-4l")}
    monkeypatch.setattr(seen, "embedded", lambda: shipped)
    monkeypatch.setattr(seen, "is_added", lambda name: False)
    return opened("picture")


def test_the_class_token_lies_over_the_picture_and_a_region_over_the_words(app, record):
    assert not app.error
    assert app.selectbox(key="picture-model").options == ["vit-digits"]
    drawn = figure(app, "word-on-picture")["data"]
    wanted = hw.on_grid(hw.analyses.word_on_picture(record, word="[CLS]", layers=-1))[0]
    assert [trace["type"] for trace in drawn] == ["image", "heatmap", "bar"]
    np.testing.assert_allclose(values(drawn[1], "z"), wanted, atol=1e-6)
    app.selectbox(key="picture-layer-vit-digits-vision").set_value(1).run()
    app.selectbox(key="picture-head-vit-digits-vision").set_value(2).run()
    app.slider(key="picture-rows-vit-digits-4").set_value((1, 2)).run()
    assert not app.exception
    drawn = figure(app, "region-words")
    (bar,) = drawn["data"]
    assert "ratio: n" not in str(drawn["layout"])
    region = hw.analyses.region_words(record, region=(1, 0, 2, 3), heads="1.2").inside
    np.testing.assert_allclose(values(bar, "y"), region[0, :1], atol=1e-6)


def test_text_pages_do_not_offer_models_that_see(monkeypatch):
    monkeypatch.setattr(runs, "embedded", embedded.embedded)
    assert "tasks-4l" in runs.offered()
    assert not {"vit-digits", "clip-digits", "vlm-digits"} & set(runs.offered())


def test_an_upload_is_a_picture_within_limits():
    file = io.BytesIO()
    Image.new("L", (8, 8), 200).save(file, "PNG")
    assert seen.uploaded(file.getvalue()).size == (8, 8)
    with pytest.raises(PromptError, match="no picture"):
        seen.uploaded(b"<svg></svg>")
    with pytest.raises(PromptError, match="the most is"):
        seen.uploaded(b"0" * (seen.MOST_BYTES + 1))
