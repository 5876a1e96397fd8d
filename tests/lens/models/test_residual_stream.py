"""The residual stream that is read is that of transformers.

Seen to fail with the residual scaled by 1.0001.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import RecordError


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
