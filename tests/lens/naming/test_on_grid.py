"""Results per token as pictures, against rows of eager weights cut out by hand.

Seen to fail: rows and columns exchanged, the first picture taken for the second.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf
import xarray as xr

import headwater as hw
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo


def test_a_row_of_a_text_on_the_grid_of_each_of_its_pictures() -> None:
    plain = zoo.build("llava")
    ids = torch.tensor([[5, *[90] * 9, 6, *[90] * 9, 7], [5, 6, *[90] * 9, *[90] * 9, 8]])
    pixels = torch.randn(4, 3, 12, 12)
    record = hw.load(zoo.build("llava")).record(ids, pixel_values=pixels)
    with torch.no_grad():
        dense = plain(input_ids=ids, pixel_values=pixels, output_attentions=True).attentions[-1]
    found = hw.analyses.raw_attention(record, heads="1.2")
    for image, starts in enumerate(((1, 2), (11, 11))):
        drawn = hw.on_grid(found, image)
        assert drawn.dims == ("batch", "query", "row", "column")
        for text, start in enumerate(starts):
            row = dense[text, 2, -1, start : start + 9].reshape(3, 3)
            np.testing.assert_allclose(drawn[text, 0], row, atol=1e-6)
    with pytest.raises(AnalysisError, match="batch row 0 has no picture 2"):
        hw.on_grid(found, 2)
    alone = hw.on_grid(found.isel(batch=1, query=0), 1)
    np.testing.assert_array_equal(alone, hw.on_grid(found, 1)[1, 0])


def test_a_statistic_of_a_tower_whose_grid_is_no_square() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = hw.load(hf.ViTModel(hf.ViTConfig(**shape, image_size=(8, 16), patch_size=4)))
    record = model.record(torch.randn(1, 3, 8, 16))
    for name in ("received", "entropy"):
        values = record.statistic(name)
        drawn = hw.on_grid(values)
        assert dict(drawn.sizes) == {"batch": 1, "layer": 1, "head": 2, "row": 2, "column": 4}
        np.testing.assert_array_equal(drawn, values.values[..., 1:].reshape(1, 1, 2, 2, 4))


def test_frames_and_what_is_no_picture() -> None:
    place = np.array([(f, r, c) for f in range(2) for r in range(2) for c in range(3)])
    coords = {
        f"key_{name}": ("key", each) for name, each in zip(("frame", "row", "column"), place.T, strict=True)
    }
    video = xr.DataArray(np.arange(12.0), coords, ("key",), name="share")
    np.testing.assert_array_equal(hw.on_grid(video), np.arange(12.0).reshape(2, 2, 3))
    turned = video.isel(key=np.random.default_rng(0).permutation(12))
    np.testing.assert_array_equal(hw.on_grid(turned), hw.on_grid(video))
    with pytest.raises(AnalysisError, match="11 tokens do not fill the grid of picture 0, 2 × 3"):
        hw.on_grid(video[1:])
    with pytest.raises(AnalysisError, match="is not per patch of a picture"):
        hw.on_grid(xr.DataArray(np.ones(3), dims="key"))
