"""The residual stream that is read is that of transformers.

Seen to fail with the residual scaled by 1.0001.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch
from hybrid_models import built

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


def test_the_final_stream_is_behind_the_last_block_with_or_without_attention():
    model = hw.load(built("Lfm2ForCausalLM", layer_types=["full_attention", "conv"] * 2))
    assert model.layers == [0, 2]
    ids, left = torch.arange(9)[None] + 3, []
    hook = model.hf.model.layers[3].register_forward_hook(lambda module, given, output: left.append(output))
    record = model.record(ids, keep=("residual",))
    hook.remove()
    final = left[0][0] if isinstance(left[0], tuple) else left[0]
    assert record.residual("final").equal(final)
