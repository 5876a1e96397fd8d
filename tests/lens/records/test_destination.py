"""A record kept on disk or on the CPU layer by layer is the one that memory holds.

Statistics of such a record lie in the file layer by layer (`stacked.py`). Seen to fail with the residual scaled
by 1.0001.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import RecordError


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


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_the_residual_stream_is_that_of_transformers(name):
    """Its hidden states are the streams before each block; the last is behind the final norm, where there is one."""
    model = hw.load(tiny_models.tiny(name))
    ids, mask = tiny_models.batch(1)
    record = model.record(ids, mask, keep=("residual",))
    with torch.no_grad():
        streams = model.hf(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for layer in record.layers:
        assert record.residual(layer)[mask.bool()].equal(streams[layer][mask.bool()])
    norm = getattr(model.hf.base_model, "norm", getattr(model.hf.base_model, "ln_f", torch.nn.Identity()))
    with torch.no_grad():
        assert norm(record.residual("final"))[mask.bool()].equal(streams[-1][mask.bool()])
    with pytest.raises(RecordError, match="keep=\\('qk', 'residual'\\)"):
        model.record(ids, mask).residual(0)
