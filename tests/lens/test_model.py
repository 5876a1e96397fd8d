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
