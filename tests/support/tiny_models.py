"""Random transformers models of the architectures that matter, small enough for every test."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

VOCAB, LAYERS, HEADS = 97, 3, 4
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CAUSAL = ("gpt2", "llama", "mistral", "gemma2", "gptoss")
ALL = (*CAUSAL, "bert")


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode; weights are larger than usual so that attention is far from uniform."""
    torch.manual_seed(seed)
    if name == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_embd=32,
                n_layer=LAYERS,
                n_head=HEADS,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**_GROUPED))
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=5))
    elif name == "gemma2":
        shape = _GROUPED | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
        model = Gemma2ForCausalLM(Gemma2Config(**shape, attn_logit_softcapping=2.0))
    elif name == "gptoss":
        shape = _GROUPED | {
            "head_dim": 8,
            "sliding_window": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        }
        model = GptOssForCausalLM(GptOssConfig(**shape, rope_parameters=_ROPE))
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    elif name == "bert":
        model = BertForMaskedLM(BertConfig(**_SHAPE))
    else:
        raise ValueError(name)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in key and "wte" not in key:
                weight.mul_(4.0)
    return model.eval()


def batch(seed: int = 0, lengths: tuple[int, ...] = (17, 11)) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and a mask of right padding, both [batch, position]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids, mask.long()
