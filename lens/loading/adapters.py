"""Adapters of peft: a `PeftModel` is opened as the transformers model inside, with its adapters unmerged and active.

Adapters that act inside of the transformers model (LoRA, DoRA, IA3 …) are part of what its modules give, and
lens/models/linear.py reads them. Prompt and prefix tuning put vectors beside the text, which only the PeftModel does.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from headwater.lens.errors import ModelError


def is_adapted(source: object) -> bool:
    """Whether this is a PeftModel; peft is not imported."""
    return isinstance(source, nn.Module) and _of_peft(source) and hasattr(source, "get_base_model")


def adapted(source: Any) -> PreTrainedModel:
    """The transformers model inside a PeftModel; ModelError names a method that acts outside of it."""
    config = getattr(source, "active_peft_config", None)
    kind = str(getattr(getattr(config, "peft_type", None), "value", type(config).__name__))
    if getattr(config, "is_prompt_learning", False):
        raise ModelError(
            f"{type(source).__name__} has adapters of the kind {kind}, which put keys or vectors beside the text; "
            "load() takes adapters of weights (LoRA, DoRA, IA3 …), or get_base_model() without these"
        )
    found = source.get_base_model()
    if not isinstance(found, PreTrainedModel):
        raise ModelError(
            f"{type(source).__name__} holds a {type(found).__name__}, which is not a transformers model"
        )
    return found


def refuse_changed_attention(hf: nn.Module) -> None:
    """ModelError if an adapter stands in the place of an attention module and adds keys of its own."""
    for path, module in hf.named_modules():
        if _of_peft(module) and "attention" in type(module).__name__.lower():
            raise ModelError(
                f"{path} is peft's {type(module).__name__}, which adds keys of its own to the text's; load() takes "
                "adapters of weights (LoRA, DoRA, IA3 …)"
            )


def _of_peft(module: object) -> bool:
    return type(module).__module__.partition(".")[0] == "peft"
