"""The language of the sink family: random words, spans of which come again, and triggers that call back a word.

What comes next can be known at two kinds of place. Within a repeated span a head that looks for what followed last time
knows it (induction); after a trigger ("red and red") the next word is the one before the trigger, the backcopy task of
Guo et al. 2024 ("Active-dormant attention heads", from memory). Everywhere else such a head has nothing to bring and
must rest somewhere.
"""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BOS, UNK = 0, 1
TRIGGERS = ("and", "or", "with")
WORDS = (
    "red", "blue", "green", "gold", "silver", "amber", "ivory", "scarlet", "violet", "pearl", "cat",
    "dog", "fox", "hare", "wolf", "bear", "deer", "otter", "crow", "owl", "oak", "elm", "ash",
    "pine", "birch", "cedar", "maple", "willow", "beech", "larch", "river", "lake", "pond", "brook",
    "sea", "bay", "cove", "marsh", "spring", "fall", "stone", "sand", "clay", "chalk", "slate",
    "flint", "marble", "coal", "salt", "iron", "lamp", "door", "roof", "wall", "floor", "stair",
    "bench", "table", "cup", "bowl",
)  # fmt: skip
NAMES = ("<bos>", "<unk>", *TRIGGERS, *WORDS)
VOCABULARY = len(NAMES)
FIRST_WORD = 2 + len(TRIGGERS)
TRIGGER_SHARE, REPEAT_SHARE = 0.15, 0.08
SPAN = (3, 9)  # words of a repeated span: at least, and one more than at most


def texts(count: int, length: int, seed: str) -> Tensor:
    """`count` texts of `length` tokens, the first of each `<bos>`, int64 [text, position]; set by the seed alone."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        row = [BOS, rng.randrange(FIRST_WORD, VOCABULARY)]
        while len(row) < length:
            if len(row) > SPAN[1] and rng.random() < REPEAT_SHARE:
                span = rng.randrange(*SPAN)
                start = rng.randrange(1, len(row) - span)
                row.extend(row[start : start + span])
            elif 2 <= row[-1] < FIRST_WORD:
                row.append(row[-2])
            elif rng.random() < TRIGGER_SHARE:
                row.append(rng.randrange(2, FIRST_WORD))
            else:
                row.append(rng.randrange(FIRST_WORD, VOCABULARY))
        rows.append(row[:length])
    return torch.tensor(rows)


def random_tokens(count: int, length: int, seed: str) -> Tensor:
    """`<bos>` and words drawn evenly, with no order between them."""
    rng = random.Random(seed)
    return torch.tensor(
        [[BOS, *(rng.randrange(FIRST_WORD, VOCABULARY) for _ in range(length - 1))] for _ in range(count)]
    )


def repeated_token(count: int, length: int, seed: str) -> Tensor:
    """One word over and over, without `<bos>`."""
    rng = random.Random(seed)
    return torch.tensor([[rng.randrange(FIRST_WORD, VOCABULARY)] * length for _ in range(count)])


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, `<bos>` put in front on encoding."""
    tool = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token="<unk>"))
    tool.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tool.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tool, bos_token="<bos>", unk_token="<unk>", model_max_length=256
    )
