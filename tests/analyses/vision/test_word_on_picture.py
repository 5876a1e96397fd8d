"""The weights between a word and patches, held to weights that are picked by hand from dense maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.lens.loading import zoo


@pytest.fixture(scope="module")
def told() -> hw.Record:
    """A text, of which 9 are the patches of a picture."""
    given = zoo.inputs("llava", lengths=(9, 7))
    ids, mask = given.pop("input_ids"), given.pop("attention_mask")
    return hw.load(zoo.build("llava")).record(ids, mask, **given)


@pytest.fixture(scope="module")
def named(told) -> hw.Record:
    """The same with words."""
    from dataclasses import replace

    words = [["a", "▁hid", "den", *strings[3:]] for strings in told.strings]
    return replace(told, strings=words)


def test_the_row_of_a_word_is_the_mean_over_its_pieces_and_heads(named):
    found = hw.analyses.word_on_picture(named, word="hidden")
    dense = torch.cat([named.pattern(layer) for layer in named.layers], 1).double().mean(1)
    np.testing.assert_allclose(found[0], dense[0, 1:3].mean(0), atol=1e-6)
    last = hw.analyses.word_on_picture(named, layers=[0], heads="1.2")
    row = int(named.valid[1].nonzero()[-1])
    np.testing.assert_allclose(
        last[1][named.valid[1]], named.pattern(1, 2)[1, row][named.valid[1]], atol=1e-6
    )
    (grid,) = named.grids[0]
    picture = hw.on_grid(last)
    np.testing.assert_allclose(picture[0].values.ravel(), last[0].values[grid.tokens()])


def test_where_patches_look_the_words_are_columns():
    """Cross-attention of a text-to-image model: queries are patches, keys are words."""
    import tiny_diffusers

    model = hw.load(tiny_diffusers.pixart())
    record = model.record(dict(model.hf.arguments.tensors)).part("cross")
    dense = torch.cat([record.pattern(layer) for layer in record.layers], 1).double().mean(1)
    found = hw.analyses.word_on_picture(record, position=2)
    assert found.dims == ("batch", "query")
    np.testing.assert_allclose(found, dense[:, :, 2], atol=1e-6)


def test_what_does_not_fit_is_told_in_a_line(named):
    with pytest.raises(hw.HeadwaterError, match="its tokens are a, hid, den"):
        hw.analyses.word_on_picture(named, word="cat")
    with pytest.raises(hw.HeadwaterError, match="no patches of a picture"):
        hw.analyses.word_on_picture(hw.load("tasks-4l").record("Mary gave"))
