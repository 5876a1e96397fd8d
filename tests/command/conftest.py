"""A tiny random GPT-2 in a folder with a word-level tokenizer, and the command run in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from headwater.command.cli import app

WORDS = ["<unk>", "<bos>", "the", "cat", "sat", "on", "a", "mat", ".", "\x1b[31mred"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a two-layer model with two heads in each and a context of 16 tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": len(WORDS)}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<bos>").save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture
def headwater() -> Callable[..., Any]:
    """Runs `headwater ARGUMENTS`; standard input is empty unless given."""

    def run(*arguments: str | Path, stdin: str | bytes = "") -> Any:
        return CliRunner().invoke(app, [str(word) for word in arguments], input=stdin)

    return run
