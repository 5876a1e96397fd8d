"""Heads by name, index, mask and result, which mean the same.

Seen to fail: dimensions looked for at column 0, flat indices read over [head, layer].
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch
import xarray as xr

import headwater as hw
from headwater.lens.errors import HeadError
from headwater.lens.naming.heads import Head, chosen


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("llama"))


def test_heads_are_named_in_many_ways_that_mean_the_same():
    importance = xr.DataArray(np.array([[3.0, 9.0], [1.0, 8.0], [2.0, 0.0]]), dims=("layer", "head"),
                              coords={"layer": [0, 2, 4], "head": [0, 1]})  # fmt: skip
    flat = importance.values.ravel().argsort()[::-1][:2]  # 0.1 and 2.1
    stacked = importance.stack(unit=("layer", "head"))
    for named in (
        ["0.1", "2.1"], [Head(0, 1), (2, 1)], ("0.1", "2.1"), flat, flat.tolist(), torch.tensor(flat.copy()),
        importance > 5, (importance > 5).values, torch.tensor([[False, True], [False, True], [False, False]]),
        [[False, True], [False, True], [False, False]], stacked.sortby(stacked)[-2:], iter(["2.1", "0.1"]),
        xr.DataArray(flat, dims="n"),
    ):  # fmt: skip
        found = chosen(named, "all", [0, 2, 4], 2)
        assert {layer: mask.tolist() for layer, mask in found.items()} == {
            0: [False, True],
            2: [False, True],
        }, named
    assert chosen(np.array([], dtype=int), "all", [0, 2], 2) == {} == chosen([], "all", [0, 2], 2)
    assert list(chosen(importance > 5, [2], [0, 2, 4], 2)) == [2]


@pytest.mark.parametrize(("heads", "message"), [
    ([12], "no head has the flat index 12; 3 layers × 4 heads go from 0 to 11"),
    (np.array([[0, 1, 2, 3]] * 3), "mask, bool .layer, head., or flat indices"),
    (np.zeros((2, 4), dtype=bool), "must be .3 layers, 4 heads.; got .2, 4."),
    (np.array([0.5]), "flat indices"), ({"5.1": 1}, "heads are 'all'"), (3, "heads are 'all'"), (True, "heads are"),
    (xr.DataArray(np.zeros((4, 3), dtype=bool), dims=("head", "layer")), "dimensions layer and head; got head, layer"),
])  # fmt: skip
def test_wrong_heads_are_refused_in_one_line(model, heads, message):
    with pytest.raises(HeadError, match=message) as caught:
        model.edit(hw.TowardIdentity(0.5, heads=heads))
    assert "\n" not in str(caught.value)
