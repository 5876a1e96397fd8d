"""What is taken from one forward pass: the loss, head outputs, and gradients of gates."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import ModelError


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("gpt2"))


def test_loss_is_the_mean_over_real_next_tokens(model):
    ids, mask = tiny_models.batch()
    logits = model(ids[1:, :11])
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1, 1:11])
    torch.testing.assert_close(model.loss(ids, mask)[1], expected)


def test_head_outputs_and_gates(model):
    ids, mask = tiny_models.batch()
    z = model.head_outputs(ids, mask)
    assert z.shape == (2, 3, 4, 17, 8)
    gates = torch.ones(2, 3, 4, requires_grad=True)
    with model.gated(gates):
        loss = model.loss(ids, mask)
    (slope,) = torch.autograd.grad(loss.sum(), gates)
    step = 1e-2
    for row, layer, head in ((0, 0, 1), (1, 2, 3)):
        moved = [torch.ones(2, 3, 4) for _ in range(2)]
        moved[0][row, layer, head] += step
        moved[1][row, layer, head] -= step
        with model.gated(moved[0]):
            up = model.loss(ids, mask)
        with model.gated(moved[1]):
            down = model.loss(ids, mask)
        assert slope[row, layer, head] == pytest.approx(float((up - down)[row] / (2 * step)), abs=2e-4)
    with pytest.raises(hw.HeadwaterError, match="gates must be"):
        model.gated(torch.ones(3, 4))


def test_a_model_in_training_mode_is_refused_when_it_runs():
    model = hw.load(tiny_models.tiny("gpt2").train())
    ids, _ = tiny_models.batch()
    model(ids)  # load() puts it into eval mode
    model.hf.train()
    with pytest.raises(ModelError, match="in training mode"):
        model(ids)


@pytest.mark.parametrize("run", ["record", "head_outputs"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_run_that_looks_at_no_logits_computes_none(name, run):
    """Seen to fail with those of the last position computed."""
    model = hw.load(tiny_models.tiny(name))
    ids, _ = tiny_models.batch()
    seen, head = [], model.hf.get_output_embeddings()
    whole = head.forward
    head.forward = lambda hidden: seen.append(hidden) or whole(hidden)
    getattr(model, run)(ids)
    assert [hidden.shape[1] for hidden in seen] == [0]
    del head.forward
    assert model(ids).shape[:2] == ids.shape


@pytest.mark.parametrize("where", ["", "lm_head"])
def test_a_hook_that_may_look_at_logits_gets_those_of_the_last_position(where):
    model = hw.load(tiny_models.tiny("llama"))
    ids, _ = tiny_models.batch()
    seen = []
    with model.hf.get_submodule(where).register_forward_hook(lambda _, given, out: seen.append(out)):
        model.record(ids)
    found = seen[0] if where else seen[0].logits
    torch.testing.assert_close(found, model(ids)[:, -1:])
