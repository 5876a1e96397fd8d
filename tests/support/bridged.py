"""A small random model, and a TransformerLens bridge on a copy of its weights, for tests that hold one to the other."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from headwater.lens.loading import zoo

MISSING = "transformer-lens is not installed (extra transformer-lens)"


def varied(name: str, seed: int = 5) -> PreTrainedModel:
    """A family of the zoo with biases that are not 0 and gains that are not 1, so that none can be forgotten."""
    model = zoo.build(name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("bias"):
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
            elif "norm" in key.lower() or "ln_" in key:
                weight.add_(0.3 * torch.rand(weight.shape, generator=generator))
    return model


def bridge_of(model: PreTrainedModel) -> Any:
    """A bridge on this very model, whose modules it replaces."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def both(name: str) -> tuple[PreTrainedModel, Any]:
    """The model, and a bridge on a copy of it."""
    model = varied(name)
    return model, bridge_of(copy.deepcopy(model))


def quietly(function: Any, *given: Any, **more: Any) -> Any:
    """Call TransformerLens where its warnings, which say how it computes, are not the matter of the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*given, **more)
