"""Tokens that are parts of a character are named by their bytes; all others are what the tokenizer decodes."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from headwater.lens.naming.token_bytes import readable, token_text
from headwater.lens.trained.registry import added_folder, is_added

TEXT = "naïve 日本 🙂 �"


def byte_level():
    """Every byte is one token, but for the two that begin 日."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    begun = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("日")[0][0]
    words = {letter: i for i, letter in enumerate([*letters, begun[:2]])}
    tool = Tokenizer(models.BPE(words, [(begun[0], begun[1])]))
    tool.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tool.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tool)


def with_fallback():
    """Letters, and a token per byte for what is no letter, as SentencePiece has it."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"naive "]
    tool = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tool.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tool, unk_token="<unk>")


def named(text: str) -> list[str]:
    """A token per byte, by hand."""
    return [chr(byte) if byte < 128 else f"‹{byte:02X}›" for byte in text.encode()]


def test_bytes_of_a_byte_level_tokenizer_are_named():
    tokenizer = byte_level()
    shown = [token_text(tokenizer, i) for i in tokenizer(TEXT)["input_ids"]]
    assert shown == [*named("naïve "), "‹E6 97›", "‹A5›", *named("本 🙂 �")]


def test_bytes_that_a_vocabulary_falls_back_on_are_named():
    tokenizer = with_fallback()
    assert [token_text(tokenizer, i) for i in tokenizer(TEXT)["input_ids"]] == named(TEXT)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", ""),
        ("naïve 日本 �".encode(), "naïve 日本 �"),
        (" 日".encode()[:-1], " ‹E6 97›"),
        ("日本".encode()[2:], "‹A5›本"),
        (b"a\xff\xfeb\xf0", "a‹FF FE›b‹F0›"),
    ],
)
def test_whole_characters_stay_and_broken_ones_are_numbers(content, text):
    assert readable(content) == text


def test_a_real_tokenizer_of_bytes():
    if not is_added("smollm2-135m"):
        pytest.skip("smollm2-135m was not added")
    tokenizer = AutoTokenizer.from_pretrained(added_folder("smollm2-135m"))
    shown = [token_text(tokenizer, i) for i in tokenizer(TEXT)["input_ids"]]
    assert shown[:6] == ["na", "ïve", " ‹E6›", "‹97›", "‹A5›", "本"]
    assert not any("�" in text for text in shown[:-1])
