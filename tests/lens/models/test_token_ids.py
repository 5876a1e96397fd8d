"""Answers as tokens, by their id and by words as tokenizers of different kinds take them."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

import headwater as hw
from headwater import analyses
from headwater.lens.errors import PromptError
from headwater.lens.models.token_ids import token_id

CLEAN = "When Mary and John went to the store , John gave a drink to"


@pytest.fixture(scope="module")
def model() -> hw.HookedModel:
    return hw.load("tasks-4l")


@pytest.fixture
def spaced(model: hw.HookedModel, monkeypatch: pytest.MonkeyPatch) -> hw.HookedModel:
    """A tokenizer as GPT-2's: " Mary" is a token, "Mary" is two, "John" and " John" are two different ones."""
    words = ["<unk>", "▁Mary", "M", "ary", "John", "▁John"]
    inner = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    inner.normalizer = normalizers.Replace(" ", "▁")
    monkeypatch.setattr(
        model, "tokenizer", PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    )
    return model


def test_an_id_is_itself(model: hw.HookedModel) -> None:
    for given in (17, "#17", np.int64(17)):
        assert token_id(model, given, "answer") == 17


def test_a_word_is_taken_as_it_stands_or_else_behind_a_space(spaced: hw.HookedModel) -> None:
    found = [token_id(spaced, word, "answer") for word in ("Mary", " Mary", "John", " John")]
    assert found == [1, 1, 4, 5]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (-1, "answer=-1 is no token of tasks-4l; ids go from 0 to "),
        ("#99999", "answer=99999 is no token of tasks-4l; ids go from 0 to "),
        (
            "Mary John",
            "answer='Mary John' is not one token of tasks-4l but 'Mary', 'John'; give a word that is, ",
        ),
        (
            "Bartholomew",
            "answer='Bartholomew' is not one token of tasks-4l but '<unk>'; give a word that is, ",
        ),
    ],
)
def test_refusals(model: hw.HookedModel, given: str | int, line: str) -> None:
    with pytest.raises(PromptError) as caught:
        token_id(model, given, "answer")
    assert str(caught.value).startswith(line)


def test_the_unknown_token_can_be_named(model: hw.HookedModel) -> None:
    assert token_id(model, model.tokenizer.unk_token, "blank") == model.tokenizer.unk_token_id


def test_analyses_and_experiments_read_answers_alike(model: hw.HookedModel) -> None:
    with pytest.raises(PromptError, match="answer='Bartholomew' is not one token"):
        analyses.direct_logit_attribution(model, [CLEAN], answer="Bartholomew")
    named, numbered = (
        analyses.direct_logit_attribution(model, [CLEAN], answer=answer)
        for answer in ("Mary", f"#{token_id(model, 'Mary', 'answer')}")
    )
    np.testing.assert_array_equal(named, numbered)
