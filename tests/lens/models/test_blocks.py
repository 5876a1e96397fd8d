"""The parts of a block by what they do: what attention and MLP add is the stream's own difference, norms are norms.

Mutation seen to fail: Gemma's norm behind the MLP not taken for what is added.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.models import blocks, norms


@pytest.mark.parametrize("name", tiny_models.CAUSAL)
def test_attention_and_mlp_add_up_to_the_blocks_difference(name):
    model = hw.load(tiny_models.tiny(name))
    ids, _ = tiny_models.batch(1, (9, 9))
    found = blocks.block(model, 1)
    added: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(
            lambda _, __, out: added.append(out[0] if isinstance(out, tuple) else out)
        )
        for module in (found.attention_out, found.mlp_out)
    ]
    record = model.record(ids, keep=("residual",))
    for hook in hooks:
        hook.remove()
    difference = record.residual(2) - record.residual(1)
    torch.testing.assert_close(added[0] + added[1], difference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", tiny_models.CAUSAL)
def test_the_final_norm_gives_what_the_head_reads(name):
    model = hw.load(tiny_models.tiny(name))
    ids, _ = tiny_models.batch(1, (9, 9))
    stream = model.record(ids, keep=("residual",)).residual("final")
    norm = blocks.final_norm(model)
    with torch.no_grad():
        read = norm(stream)
    torch.testing.assert_close(read, model.embeddings(ids), atol=1e-5, rtol=1e-5)
    assert norms.takes_mean_out(norm, 32) == (name == "gpt2")
    assert norms.epsilon(norm) == pytest.approx(1e-5 if name in ("gpt2", "gptoss") else 1e-6)
