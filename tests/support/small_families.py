"""Tiny random models of many families, and the weights that their attention modules give by themselves."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

S: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
TEXT = S | {
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PICTURE = S | {"image_size": 16, "patch_size": 4}


def made(name: str, config: dict[str, Any]) -> Any:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind._from_config(kind.config_class(**config), attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in key:
                weight.mul_(3)
    return model


def eager(model: Any, path: str, inputs: dict[str, Tensor]) -> Tensor:
    """The weights that one attention module gives, from a hook."""
    found = []

    def keep(_: Any, __: Any, output: Any) -> None:
        found.extend([t for t in reversed(output) if isinstance(t, Tensor) and t.dim() == 4][:1])

    with model.get_submodule(path).register_forward_hook(keep), torch.no_grad():
        model(**inputs)
    return found[0]
