"""Results are kept within a number of bytes, counted by hand.

Seen to fail with an oldest that stays, a use that does not count, and an array that counts twice.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from tiny_models import tiny

import headwater as hw
from headwater.dashboard.state.kept import Kept, size_of


def test_past_the_bytes_the_one_used_longest_ago_goes() -> None:
    kept = Kept(2000)
    for name in "abc":
        kept.put(name, np.zeros(100))  # 800 bytes
        assert kept.get("a") is not None  # used again and again
    assert ["a" in kept, "b" in kept, "c" in kept] == [True, False, True]
    assert kept.bytes() == 1600


def test_the_newest_stays_whatever_it_takes() -> None:
    kept = Kept(10)
    kept.put("a", np.zeros(2))
    kept.put("b", np.zeros(100))
    assert kept.get("a") is None
    assert kept.get("b").size == 100


ARRAY, TENSOR = np.zeros((4, 5)), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("result", "size"),
    [
        (ARRAY, 160),
        ([ARRAY, {"again": ARRAY, 1: TENSOR}], 160 + 24 + len("again") + 49),
        ((TENSOR[:1], TENSOR), 24),  # views of one storage
        (pd.DataFrame({"a": np.zeros(10)}), 80 + pd.RangeIndex(10).memory_usage()),
        (xr.DataArray(np.zeros(6), {"x": np.zeros(6)}, ["x"]), 96),
        (None, 0),
    ],
)
def test_sizes(result: object, size: int) -> None:
    assert size_of(result) == size


def test_a_record_counts_what_it_holds_and_a_model_nothing() -> None:
    model = hw.load(tiny("llama"))
    lengths = [16, 64]
    small, large = (size_of(model.record(torch.zeros(1, n, dtype=torch.long))) for n in lengths)
    assert 2 * small < large < 8 * small
    keys = model.record(torch.zeros(1, 64, dtype=torch.long)).map(0).k
    assert large > 2 * len(model.layers) * keys.numel() * keys.element_size()
    assert size_of([model]) < small
