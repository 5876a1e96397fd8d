"""Tokenizers of three kinds, trained on texts in which some names are frequent and others never occur."""

from __future__ import annotations

from functools import cache
from typing import Any

import tokenizers
import transformers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from headwater.data.prompts import tasks, texts
from headwater.data.prompts.words import ARGUMENTS, CAPITALS, COLORS, EVENTS, NAMES, OBJECTS

RARE = {"Isabel", "Quinn", "Fiona", "Copenhagen", "keychain", "dynasty", "parent"}


PAIRS = [f"{n:02}" for n in range(100)]


WORDS = [*NAMES, *CAPITALS, *CAPITALS.values(), *COLORS, *OBJECTS, *EVENTS, *ARGUMENTS, *tasks.vocabulary()]


def corpus() -> list[str]:
    """Every word but the rare ones often behind another, and every pair of digits."""
    lines = [f"the {word} and the {word}, {word}." for word in WORDS if word.isalpha() and word not in RARE]
    return lines * 3 + [f"the {pair}{pair}" for pair in PAIRS] * 30


@cache
def made(kind: str) -> Any:
    options: dict[str, Any] = {"special_tokens": ["<unk>", "<bos>"], "show_progress": False}
    if kind in ("bpe", "digits"):  # as GPT-2 has it, or with every digit a token
        inner = tokenizers.Tokenizer(models.BPE())
        twos: Any = pre_tokenizers.Split(tokenizers.Regex(r" ?\d\d"), "isolated")
        if kind == "digits":
            twos = pre_tokenizers.Digits(individual_digits=True)
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [twos, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=1700, initial_alphabet=alphabet, **options)
    elif kind == "wordpiece":  # as BERT has it, in lower case
        inner = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        inner.normalizer = normalizers.Lowercase()
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=1400, **options)
    else:  # as SentencePiece has it, whole words likelier than their letters
        known = sorted({word for word in WORDS if word not in RARE})
        letters = sorted({letter for word in WORDS for letter in word} | set('▁0123456789()":_\n'))
        parts = [f"▁{c}" for c in texts.CENTURIES] + PAIRS
        pieces = [("<unk>", 0.0), ("<bos>", 0.0)] + [(f"▁{word}", -5.0) for word in known if len(word) > 1]
        pieces += [(part, -6.0) for part in parts] + [(letter, -9.0) for letter in letters]
        inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Metaspace()
        trainer = None
    if trainer is not None:
        inner.train_from_iterator(corpus(), trainer)
    if kind == "wordpiece":  # with years as "17" and "##32"
        vocabulary = [word for word in inner.get_vocab() if not any(sign.isdigit() for sign in word)]
        vocabulary += [*texts.CENTURIES, *(f"##{pair}" for pair in PAIRS)]
        inner.model = models.WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>")
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>")


def pieces(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
