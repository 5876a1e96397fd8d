"""Prompts in, logits out, and what bad input gets; records never hold a queries × keys tensor."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import ModelError


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("gpt2"))


def test_words_outside_of_the_vocabulary_are_named():
    trained = hw.load("tasks-4l")
    assert trained.unknown_words(["Mary swam , xylophone", "xylophone ! Mary"]) == ["swam", "xylophone", "!"]
    assert trained.unknown_words("Mary and John") == []
    assert hw.load(tiny_models.tiny("gpt2")).unknown_words("anything") == []


def test_models_without_a_language_head_give_no_logits():
    from transformers import BertConfig, BertModel

    model = hw.load(
        BertModel(
            BertConfig(
                vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
            )
        )
    )
    with pytest.raises(ModelError, match=r"no language head, so it gives no logits; use model.embeddings"):
        model(torch.tensor([[5]]))
    with pytest.raises(ModelError, match="can not continue a text"):
        model.generate(torch.tensor([[5]]))
    assert model.embeddings(torch.tensor([[5, 6]])).shape == (1, 2, 16)


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
