"""The words of a region, held to means over weights that are picked by hand from dense maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.lens.loading import zoo


@pytest.fixture(scope="module")
def named() -> hw.Record:
    """A text, of which 9 are the patches of a picture."""
    given = zoo.inputs("llava", lengths=(9, 7))
    ids, mask = given.pop("input_ids"), given.pop("attention_mask")
    return hw.load(zoo.build("llava")).record(ids, mask, **given)


def test_the_words_of_a_region_are_means_over_its_patches(named):
    found = hw.analyses.region_words(named, region=(0, 0, 1, 0), heads="0.1")
    (grid,) = named.grids[0]
    within, without = grid.tokens()[[0, 3]], grid.tokens()[[1, 2, 4, 5, 6, 7, 8]]
    dense = named.pattern(0, 1)[0].double()
    words = sorted(set(range(int(named.valid[0].sum()))) - set(grid.tokens().tolist()))
    np.testing.assert_allclose(found.inside[0].sel(query=words), dense[words][:, within].mean(1), atol=1e-6)
    np.testing.assert_allclose(found.outside[0].sel(query=words), dense[words][:, without].mean(1), atol=1e-6)
    assert not set(grid.tokens().tolist()) & set(found.coords["query"].values.tolist())


def test_where_patches_look_the_words_are_keys():
    import tiny_diffusers

    model = hw.load(tiny_diffusers.pixart())
    record = model.record(dict(model.hf.arguments.tensors)).part("cross")
    dense = torch.cat([record.pattern(layer) for layer in record.layers], 1).double().mean(1)
    found = hw.analyses.region_words(record, region=(0, 1))
    np.testing.assert_allclose(found.inside, dense[:, int(record.grids[0][0].tokens()[1])], atol=1e-6)
    np.testing.assert_allclose(found.ratio, found.inside / found.outside)


def test_what_does_not_fit_is_told_in_a_line(named):
    with pytest.raises(hw.HeadwaterError, match="beyond the grid of 3 × 3"):
        hw.analyses.region_words(named, region=(0, 3))
    with pytest.raises(hw.HeadwaterError, match="no patches of a picture"):
        hw.analyses.region_words(hw.load("tasks-4l").record("Mary gave"))
    with pytest.raises(hw.HeadwaterError, match="a box"):
        hw.analyses.region_words(named, region=(0, 1, 2))
