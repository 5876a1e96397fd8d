"""Texts that suit a model: an embedded one knows every word of the texts that it is offered."""

from __future__ import annotations

import pytest

import headwater as hw
from headwater.dashboard.running.inputs import first_text
from headwater.dashboard.running.prompts import prompts_for
from headwater.lens.models.embedded import embedded

READERS = [name for name, known in embedded().items() if known["reads"] == "text"]


@pytest.mark.parametrize("name", READERS)
def test_an_embedded_model_knows_every_word_of_its_texts(name):
    model = hw.load(name)
    texts = [first_text(name), *prompts_for(model).values()]
    assert len(texts) > 2
    assert model.unknown_words(texts) == []


def test_the_first_text_of_the_sink_family_ends_in_a_word_that_is_called_back():
    model = hw.load("sink-2l-softmax")
    text = first_text(model.name)
    likeliest = int(model(model.to_tokens(text))[0, -1].argmax())
    assert model.to_strings([likeliest]) == [text.split()[-2]]
