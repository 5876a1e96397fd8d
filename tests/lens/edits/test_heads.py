"""Mean and resample ablation against outputs replaced on the dense oracle.

Scaling, zeroing and offsets are in `test_dense_meaning.py`, beside the other edits.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch
from comparison import close_run
from dense_oracle import Oracle, run
from hybrid_models import HYBRIDS, hybrid

import headwater as hw
from headwater.lens.naming.tokens import Tokens


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_mean_and_resample_ablation_take_their_values_from_the_examples(architecture):
    model = hw.load(tiny_models.tiny(architecture))
    ids, mask = tiny_models.batch(7)
    examples, lengths = tiny_models.batch(8, (17, 9))
    source = Oracle()
    run(tiny_models.tiny(architecture), examples, lengths, source)
    real = lengths.bool()
    mean = source.z[1].transpose(1, 2)[real].mean(0)[2]  # head 2 of layer 1 over the real positions

    def to_mean(layer, z):
        z = z.clone()
        if layer == 1:
            z[:, 2] = mean
        return z

    expected = run(tiny_models.tiny(architecture), ids, mask, Oracle(outputs=to_mean))
    with model.edit(hw.AblateHeads("1.2", ablation="mean", examples=Tokens(examples, real))):
        close_run(model(ids, mask)[mask.bool()], expected[mask.bool()], 2e-4)

    def to_sample(layer, z):
        z = z.clone()
        if layer == 1:
            z[:, 2] = source.z[1][:1, 2]  # the only example that is long enough
        return z

    expected = run(tiny_models.tiny(architecture), ids, mask, Oracle(outputs=to_sample))
    with model.edit(hw.AblateHeads("1.2", ablation="resample", examples=Tokens(examples, real))):
        close_run(model(ids, mask)[mask.bool()], expected[mask.bool()], 2e-4)


@pytest.mark.parametrize("name", [n for n in HYBRIDS if n not in ("granite", "minimax")])
def test_ablated_heads_of_a_hybrid_are_columns_of_the_output_projection_set_to_zero(name):
    """Between mixers, with output gates or shared blocks, against a hook on the transformers module."""
    model = hw.load(hybrid(name))
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1))
    for layer in model.layers:
        wide = model.shape(layer).d_value
        inner = dict(model.attention_module(layer).named_modules())
        projection = next(inner[key] for key in ("o_proj", "out_proj") if key in inner)
        with model.edit(hw.AblateHeads([f"{layer}.1"])):
            found = model(ids)

        def silence(_, args, span=slice(wide, 2 * wide)):
            z = args[0].clone()
            z[..., span] = 0
            return (z,)

        with torch.no_grad():
            hook = projection.register_forward_pre_hook(silence)
            expected = model.hf(input_ids=ids).logits
            hook.remove()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (found - model(ids)).abs().max() > 1e-3
