"""Raw attention against eager float64 maps.

Mutations seen to fail: layers with unequal numbers of heads averaged one by one, the largest of the sum of layers,
the wrong layer for -1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from limits import lower

import headwater as hw
from headwater.analyses.tokens.raw_attention import raw_attention
from headwater.lens.errors import HeadwaterError


@pytest.mark.parametrize("over", ["mean", "max", "min"])
def test_matches_eager_maps(pair, batch, over: str) -> None:
    ids, mask = batch
    record = pair.model.record(ids, attention_mask=mask)
    maps = pair.maps(ids, mask)  # [layer, batch, head, query, key]
    merge = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}[over]
    for layers, picked in (((-1,), maps[2:]), ([0, 2], maps[[0, 2]]), ("all", maps)):
        dense = merge(picked, dim=(0, 2))
        found = raw_attention(record, queries=[0, -1], layers=layers, over=over)
        for row, real in enumerate(mask.bool()):
            np.testing.assert_allclose(
                found.values[row][:, real.numpy()], dense[row][real][:, real][[0, -1]], atol=5e-6
            )
            assert np.isnan(found.values[row][:, ~real.numpy()]).all()


def test_named_heads_of_several_layers_weigh_the_same(pairs: Callable) -> None:
    pair = pairs("llama")
    ids = torch.arange(4, 12)[None]
    record = pair.model.record(ids)
    maps = pair.maps(ids)
    expected = (maps[0, 0, 3] + maps[2, 0, 0] + maps[2, 0, 1]) / 3
    for heads in ("0.3, 2.0 2.1", ["0.3", "2.0", "2.1"]):
        found = raw_attention(record, queries="all", heads=heads)
        np.testing.assert_allclose(found.values[0], expected, atol=1e-6)
    assert found.attrs["heads"] == '["0.3", "2.0", "2.1"]'


def test_columns_and_blocks_of_rows(pairs: Callable, monkeypatch) -> None:
    pair = pairs("mistral")
    ids = torch.arange(4, 24)[None]
    record = pair.model.record(ids)
    expected = pair.maps(ids)[2, 0].mean(0)
    lower(monkeypatch, "analyses.tokens.raw_attention", FEW=3)
    found = raw_attention(record, queries="all", keys=[0, -3])
    np.testing.assert_allclose(found.values[0], expected[:, [0, -3]], atol=1e-6)
    assert list(found.key.values) == [0, -3]


def test_a_record_of_some_layers_and_closed_forms(pairs: Callable, uniform: hw.HookedModel) -> None:
    found = raw_attention(uniform.record(torch.arange(3, 13)[None]), layers="all", queries=[4])
    np.testing.assert_allclose(found.values[0, 0], [0.2] * 5 + [0.0] * 5, atol=1e-6)
    pair = pairs("gpt2")
    ids = torch.arange(4, 12)[None]
    last = raw_attention(pair.model.record(ids, layers=[0, 1]))
    np.testing.assert_allclose(last.values[0, 0], pair.maps(ids)[1, 0, :, -1].mean(0), atol=1e-6)
    np.testing.assert_allclose(raw_attention(pair.model.record(torch.tensor([[5]]))), [[[1.0]]], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [3]}, "layer 3 is not in this record"),
        ({"layers": []}, "layers is empty"),
        ({"layers": "last"}, "not a list of whole numbers"),
        ({"heads": "0.4"}, "no such head: 0.4; the record has layers 0 to 2"),
        ({"heads": "x"}, "layer.head"),
        ({"heads": ""}, "heads is empty"),
        ({"over": "median"}, "mean, max, min"),
        ({"queries": [8]}, "has 8 tokens"),
    ],
)
def test_refusals(pairs: Callable, settings: dict, message: str) -> None:
    with pytest.raises(HeadwaterError, match=message):
        raw_attention(pairs("gpt2").model.record(torch.arange(4, 12)[None]), **settings)
