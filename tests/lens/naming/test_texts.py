"""Texts, pairs of texts and chat messages as token ids with one beginning.

Seen to fail: a second beginning kept, the types of a pair dropped, a chat template that opens no answer.
"""

from __future__ import annotations

import pytest
import small_tokenizers
import tiny_models
import torch
import transformers

import headwater as hw
from headwater.lens.errors import ModelError, PromptError
from headwater.lens.naming.texts import is_single, is_text, rows

PLAIN, BEGUN = small_tokenizers.words(), small_tokenizers.words("<bos> $A")
TALK = [{"role": "user", "content": "w5 w6"}]


def ids(given, tokenizer, *more):
    return [row.ids for row in rows(given, tokenizer, *more)]


@pytest.mark.parametrize(
    ("tokenizer", "prepend", "expected"),
    [
        (PLAIN, None, [5, 6]), (PLAIN, True, [1, 5, 6]), (PLAIN, False, [5, 6]),
        (BEGUN, None, [1, 5, 6]), (BEGUN, True, [1, 5, 6]), (BEGUN, False, [5, 6]),
    ],
)  # fmt: skip
def test_prepend_bos_puts_the_beginning_or_leaves_it_out(tokenizer, prepend, expected):
    assert ids("w5 w6", tokenizer, prepend) == [expected]
    model = hw.load(tiny_models.tiny("llama"), tokenizer)
    assert model.to_tokens("w5 w6", prepend_bos=prepend).tolist() == [expected]
    model.prepend_bos = prepend
    torch.testing.assert_close(model("w5 w6"), model([expected]))
    assert model.generate("w5 w6", 1) == model.tokenizer.decode(
        model.generate([expected], 1)[0], skip_special_tokens=True
    )


@pytest.mark.parametrize("prepend", [None, True, False])
def test_a_text_that_is_written_with_a_beginning_has_one(prepend):
    with pytest.warns(UserWarning, match="begins with '<bos>', and the tokenizer puts another"):
        assert ids("<bos> w5 w6", BEGUN, prepend) == [[1, 5, 6]]
    assert ids("<bos> w5 w6", PLAIN, prepend) == [[1, 5, 6]]


def test_a_class_token_is_a_beginning_too():
    encoder = small_tokenizers.words("[CLS] $A", start="[CLS]")
    assert ids("w5", encoder) == ids("w5", encoder, True) == [[1, 5]]
    assert ids("w5", encoder, False) == [[5]]
    with pytest.warns(UserWarning, match=r"begins with '\[CLS\]', and the tokenizer puts another"):
        assert ids("[CLS] w5", encoder) == [[1, 5]]


def test_token_ids_with_two_beginnings_are_kept_with_a_warning(recwarn):
    model = hw.load(tiny_models.tiny("llama"), BEGUN)
    for given in ([[1, 5, 6]], [[5, 1, 1]], [[1]], "w5 w6", model.to_tokens("w5")):
        model.to_tokens(given)
    assert not recwarn
    with pytest.warns(UserWarning, match="row 1 of the token ids begins twice with '<bos>'; both are kept"):
        found = model.record([[0, 1, 5, 6], [0, 1, 1, 5]], attention_mask=[[0, 1, 1, 1], [0, 1, 1, 1]])
    assert found.tokens[1].tolist() == [0, 1, 1, 5]


@pytest.mark.parametrize("given", ["no", 1, [True]])
def test_prepend_bos_is_true_or_false(given):
    model = hw.load(tiny_models.tiny("llama"), BEGUN)
    with pytest.raises(PromptError, match="prepend_bos is True, False or None; got"):
        model.record("w5", prepend_bos=given)
    with pytest.raises(ModelError, match="prepend_bos is True, False or None; got"):
        hw.load("tasks-4l", prepend_bos=given)


def test_chat_messages_go_through_the_template():
    talks = small_tokenizers.words("<bos> $A", chat_template=small_tokenizers.CHAT)
    own = talks.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert ids(TALK, talks) == [own] == [[1, 3, 5, 6]]
    assert ids([TALK, TALK], talks, None, True) == [[1, 3, 5, 6, 4]] * 2
    assert ids(TALK, talks, False) == [[3, 5, 6]]
    model = hw.load(tiny_models.tiny("llama"), talks)
    assert model.record(TALK).tokens.tolist() == [own]
    answered = model.generate(torch.tensor([[1, 3, 5, 6, 4]]), 2)[0]
    assert model.generate(TALK, 2) == talks.decode(answered, skip_special_tokens=True)
    assert model.generate([TALK], 2) == [talks.decode(answered, skip_special_tokens=True)]
    with pytest.raises(PromptError, match="has no chat template; write the conversation as one text"):
        ids(TALK, PLAIN)
    strict = small_tokenizers.words(chat_template="{{ messages[0]['content']['text']['more'] }}")
    with pytest.raises(PromptError, match=r"does not take these messages \(UndefinedError"):
        ids([{"role": "user"}], strict)


def test_pairs_bring_their_token_types():
    pairs = small_tokenizers.words(
        "<bos> $A <eos>", "<bos> $A <eos> $B:1 <eos>:1",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    own = pairs("w5", "w6 w7")
    model = hw.load(tiny_models.tiny("bert"), pairs)
    for given in (("w5", "w6 w7"), [("w5", "w6 w7")]):
        found = model.to_tokens(given)
        assert found.tolist() == [own["input_ids"]]
        assert found.more["token_type_ids"].tolist() == [own["token_type_ids"]] == [[0, 0, 0, 1, 1, 1]]
    assert not model.to_tokens("w5").more
    both = model.to_tokens([("w5", "w6 w7"), "w5"])
    assert both.more["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0] * 6]
    with torch.no_grad():
        expected = model.hf(**{k: torch.tensor([v]) for k, v in own.items()}).logits
    torch.testing.assert_close(model(("w5", "w6 w7")), expected)
    with pytest.raises(PromptError, match=r"of the tokens' shape \[1, 2\]; got torch.int64 \[1, 3\]"):
        model([[5, 6]], token_type_ids=[[0, 1, 1]])
    with pytest.raises(PromptError, match=r"go from 0 to 2; BertForMaskedLM knows 0 to 1"):
        model([[5, 6]], token_type_ids=[[0, 2]])


def test_what_can_not_be_read_is_refused():
    with pytest.raises(PromptError, match="puts nothing between them; give a list for two prompts"):
        ids(("w5", "w6"), BEGUN)
    with pytest.raises(PromptError, match="has no token that begins a text"):
        ids("w5", transformers.PreTrainedTokenizerFast(tokenizer_object=PLAIN._tokenizer), True)
    with pytest.raises(ModelError, match="has no token that begins a text"):
        hw.load(tiny_models.tiny("llama"), prepend_bos=True)
    model = hw.load(tiny_models.tiny("llama"), PLAIN)
    with pytest.raises(PromptError, match="prepend_bos belongs to texts"):
        model([[5, 6]], prepend_bos=True)
    bert = hw.load(tiny_models.tiny("bert"))
    with pytest.raises(PromptError, match="hold token_type_ids already; give pixel_values where they"):
        bert(bert.to_tokens([[5]], token_type_ids=[[1]]), pixel_values=torch.ones(1))


def test_kinds_of_prompts():
    assert [is_text(x) for x in ("a", ["a"], ("a", "b"), [("a", "b")], TALK, [TALK])] == [True] * 6
    assert [is_text(x) for x in ([1], torch.ones(1, 2), [], None, ["a", 1])] == [False] * 5
    assert [is_single(x) for x in ("a", ("a", "b"), TALK, ["a"], [TALK])] == [True, True, True, False, False]
