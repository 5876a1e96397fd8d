"""Tiny random models of six kinds with eager float64 twins, whose dense maps are the oracle of every
analysis."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers as hf
from ragged import VOCAB, padded
from torch import Tensor

import headwater as hw
from headwater.lens.trained.registry import added_folder

SHAPE = {"vocab_size": VOCAB, "initializer_range": 0.2}
LLAMA = SHAPE | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BERT = SHAPE | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OSS = LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6}
CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "gpt2": lambda: hf.GPT2Config(
        **SHAPE, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=5),
    "gemma2": lambda: hf.Gemma2Config(
        **LLAMA, sliding_window=6, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "gpt_oss": lambda: hf.GptOssConfig(**OSS),
    "bert": lambda: hf.BertConfig(**BERT),
}
CAUSAL = ("gpt2", "llama", "mistral", "gemma2", "gpt_oss")


@dataclass
class Pair:
    """A Headwater model and the untouched eager twin of the same weights in float64."""

    model: hw.HookedModel
    twin: hf.PreTrainedModel
    causal: bool

    def maps(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense weights [layer, batch, head, query, key] in float64; rows and columns of padding are zero.

        Each text runs by itself, without padding, so that a batch is also held to its texts one by one.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = []
        for text, kept in zip(ids, real, strict=True):
            with torch.no_grad():
                found = self.twin(text[kept][None], output_attentions=True).attentions
            place = kept.nonzero()[:, 0]
            row = torch.zeros(len(found), *found[0].shape[1:2], len(text), len(text), dtype=torch.float64)
            row[:, :, place[:, None], place] = torch.stack(found)[:, 0].double()
            rows.append(row)
        return torch.stack(rows, 1)

    def maps_by_head(self, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
        """The dense weights [batch, layer · head, query, key]."""
        return self.maps(ids, mask).movedim(0, 1).flatten(1, 2).numpy()


def words() -> hf.PreTrainedTokenizerFast:
    """A tokenizer whose token 7 is written w7; 0 to 2 are special."""
    special = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {word: i for i, word in enumerate(special + [f"w{i}" for i in range(3, VOCAB)])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w60"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )


def build(name: str) -> hf.PreTrainedModel:
    torch.manual_seed(5)
    config = CONFIGS[name]()
    config._experts_implementation = "eager"  # the default has no float64
    kind = hf.AutoModelForMaskedLM if name == "bert" else hf.AutoModelForCausalLM
    return kind.from_config(config, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def pairs() -> Callable[[str], Pair]:
    """The pair of a kind, built once."""
    built: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in built:
            plain = build(name)
            built[name] = Pair(
                hw.load(copy.deepcopy(plain), tokenizer=words()), plain.double(), name in CAUSAL
            )
        return built[name]

    return get


def each(names: Iterable[str]) -> list[Any]:
    """The kinds as parameters; `make quick` leaves out those whose windows and sinks the kernels' tests cover."""
    more = ("mistral", "gpt_oss")
    return [pytest.param(name, marks=pytest.mark.slow if name in more else ()) for name in names]


@pytest.fixture(params=each(CONFIGS))
def pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    return pairs(request.param)


@pytest.fixture(params=each(CAUSAL))
def causal_pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    return pairs(request.param)


@pytest.fixture(params=["right", "left"])
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    return padded(side=request.param)


@pytest.fixture(scope="session")
def minilm(minilm: hw.HookedModel) -> Pair:
    """The trained MiniLM encoder beside transformers' own of the same weights."""
    folder = added_folder("minilm")
    plain = hf.AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    return Pair(minilm, plain.double(), causal=False)


def hand_built(sink: bool = False, n_head: int = 4) -> hw.HookedModel:
    """A GPT-2 whose attention is uniform over the visible keys, or all on the first token.

    Queries and keys are zero; for a sink, the query is a constant and the key is large where position 0's
    embedding is.
    """
    torch.manual_seed(0)
    config = hf.GPT2Config(
        **SHAPE, n_embd=32, n_layer=3, n_head=n_head, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    plain = hf.GPT2LMHeadModel(config).eval()
    width = config.n_embd
    with torch.no_grad():
        for block in plain.transformer.h:
            attention = block.attn
            attention.c_attn.weight[:, : 2 * width] = 0
            attention.c_attn.bias[:] = 0
            attention.c_proj.weight[:] = 0  # the residual stream keeps the embeddings
            block.mlp.c_proj.weight[:] = 0
            if sink:
                attention.c_attn.bias[:width] = 10
                attention.c_attn.weight[0, width : 2 * width] = 10
        if sink:
            plain.transformer.wte.weight[:, 0] = 0
            plain.transformer.wpe.weight[:, 0] = -3
            plain.transformer.wpe.weight[0, 0] = 30
    return hw.load(plain)


@pytest.fixture(scope="session")
def uniform() -> hw.HookedModel:
    return hand_built()


@pytest.fixture(scope="session")
def pure_sink() -> hw.HookedModel:
    return hand_built(sink=True)


@pytest.fixture(scope="session")
def one_head() -> hw.HookedModel:
    torch.manual_seed(0)
    return hw.load(hf.GPT2LMHeadModel(hf.GPT2Config(**SHAPE, n_embd=8, n_layer=2, n_head=1)).eval())
