"""A record kept on disk or on the CPU layer by layer is the one that memory holds.

Statistics of such a record lie in the file layer by layer (`stacked.py`).
"""

from __future__ import annotations

import pytest
import tiny_models

import headwater as hw


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gptoss", "bert"])
@pytest.mark.parametrize("keep", [(), ("qk",), ("residual",), ("qkv", "residual")])
def test_streaming_to_disk_is_the_same_record(name, keep, tmp_path):
    model = hw.load(tiny_models.tiny(name))
    ids, mask = tiny_models.batch(1)
    with model.edit(hw.Redistribute([0], 0.2), hw.Knockout([4], [1])):
        held = model.record(ids, mask, keep=keep)
        path = tmp_path / "run.safetensors"
        for found in (
            model.record(ids, mask, keep=keep, keep_on="disk", path=path),
            model.record(ids, mask, keep=keep, keep_on="disk"),
            model.record(ids, mask, keep=keep, keep_on="cpu"),
            hw.Record.open(path, verify=True),
        ):
            assert found.to_xarray().identical(held.to_xarray())
            assert found.maps.keys() == held.maps.keys()
            for layer in held.maps:
                assert found.pattern(layer).equal(held.pattern(layer))
            assert found.residuals.keys() == held.residuals.keys()
            assert all(found.residual(place).equal(held.residual(place)) for place in held.residuals)
    assert list(tmp_path.iterdir()) == [path]
