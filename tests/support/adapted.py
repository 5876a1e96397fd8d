"""A tiny Llama with adapters, or with weights of few bits, and its twin whose plain weights do the same."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The warnings of peft and bitsandbytes are not the matter of these tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def plain(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(4)
    return model.to(dtype)


def adapted(targets: list[str], dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """The PeftModel of a plain model with random LoRA adapters that are as large as the weights."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **more)
    with quietly():
        found = peft.get_peft_model(plain(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                weight.normal_(std=0.2)
    return found.to(dtype).eval()


def merged(model: Any) -> LlamaForCausalLM:
    with quietly():
        return copy.deepcopy(model).merge_and_unload().eval()


def few_bits(bits: int) -> tuple[Any, LlamaForCausalLM]:
    """The model in 8 or 4 bits of bitsandbytes, and a plain one with its dequantised weights."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    with tempfile.TemporaryDirectory() as folder:
        plain().save_pretrained(folder)
        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        with quietly():
            small = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options).eval()
    twin = plain()  # made before the first run, which packs the weights
    for name, module in twin.named_modules():
        other = small.get_submodule(name)
        if type(other).__name__ == "Linear8bitLt":
            module.weight.data = other.weight.data.float() * other.weight.SCB[:, None] / 127
        elif type(other).__name__ == "Linear4bit":
            module.weight.data = dequantize_4bit(other.weight.data, other.weight.quant_state).float()
    return small, twin
