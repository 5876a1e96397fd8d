"""Prompts as token ids and masks, and the ones that are refused."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import PromptError
from headwater.lens.naming.tokens import to_tokens


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("gpt2"))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "without a tokenizer"),
        ([], "prompt is empty"),
        (torch.zeros(1, 0, dtype=torch.long), "prompt is empty"),
        ([[1, 2], [3]], "token ids of equal length"),
        (torch.tensor([[1, 97]]), "token id 97 at batch 0, position 1 is outside of the vocabulary"),
        (torch.tensor([[-1]]), "token id -1"),
        (torch.tensor([[0.5]]), "integers"),
        (torch.ones(1, 65, dtype=torch.long), "65 tokens, the model's context is 64; shorten it by 1"),
        (["a", 3], "mix of texts"),
        (None, "a prompt is a text"),
    ],
)
def test_a_bad_prompt_is_refused_in_one_line(model, prompt, message):
    with pytest.raises(PromptError, match=message) as caught:
        model(prompt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1]], "must have the tokens' shape"),
        ([[0, 0, 0]], "no real token"),
        ([[1, 0, 1]], "has a gap"),
    ],
)
def test_a_bad_mask_is_refused(model, mask, message):
    with pytest.raises(PromptError, match=message):
        model(torch.tensor([[5, 6, 7]]), torch.tensor(mask))


def test_texts_are_padded_and_blank_ones_refused():
    class Words:
        pad_token_id, eos_token_id = None, 9

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [1, *(len(word) for word in text.split())]}

    found = to_tokens(["a bb", "ccc"], Words())
    assert found.ids.tolist() == [[1, 1, 2], [1, 3, 9]]
    assert found.mask.tolist() == [[True] * 3, [True, True, False]]
    assert to_tokens(["a bb", "ccc"], Words(), side="left").ids.tolist() == [[1, 1, 2], [9, 1, 3]]
    with pytest.raises(PromptError, match=r"empty \(number 2 of 2\)"):
        to_tokens(["a", " "], Words())
