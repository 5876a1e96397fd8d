"""The transformers model inside a TransformerLens bridge, rebuilt beside it on the same weights.

A bridge replaces modules of the model by its own, and most of its attention modules do not call transformers' attention
interface. So the model is built again on the meta device, without memory for weights, and each module takes the tensors
of its original. No weight is copied, and the bridge keeps its modules, hooks and configuration. Then the outputs of
both are compared. This file does not import TransformerLens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headwater.lens.attention.function import NAME
from headwater.lens.errors import ModelError
from headwater.lens.models.closeness import close_or_refuse

PACKAGE = "transformer_lens"
WRAPPED = "_original_component"
ALLOWED = 1e-3  # largest relative difference of outputs in float32, as for every model that is loaded


def is_bridged(source: object) -> bool:
    """Whether this is a bridge, or a transformers model in which a bridge has replaced modules."""
    if _foreign(source):
        return True
    return isinstance(source, PreTrainedModel) and any(_foreign(module) for module in source.modules())


def unbridged(source: Any) -> PreTrainedModel:
    """The transformers model of a bridge, with its original modules on the same weights.

    ModelError if there is no such model in this process, if the bridge has rewritten the weights (compatibility mode),
    or if the outputs of the rebuilt model differ from those of the bridge.
    """
    hf = _inside(source)
    if hf.training:
        raise ModelError(f"{type(source).__name__} is in training mode; call its eval() before load()")
    if hf.config._attn_implementation == NAME:
        raise ModelError(
            f"the bridge was put into a {type(hf).__name__} that Headwater had opened, which breaks both; make "
            "the bridge of the model first and give load() the bridge"
        )
    with torch.device("meta"):
        found = type(hf)._from_config(copy.deepcopy(hf.config), attn_implementation="eager")
    for path, module in found.named_modules():
        _share(module, _original(hf, path), path)
    if (generation := getattr(hf, "generation_config", None)) is not None:
        found.generation_config = copy.deepcopy(generation)
    found.eval()
    _compare(hf, found)
    return found


def tokenizer_of(source: Any) -> Any:
    """The tokenizer of a bridge; None for other models.

    It may differ from the one given to `boot_transformers`, which loads the tokenizer again so that it adds the BOS
    token.
    """
    return getattr(source, "tokenizer", None) if _foreign(source) else None


def _foreign(module: object) -> bool:
    return type(module).__module__.partition(".")[0] == PACKAGE


def _inside(source: Any) -> PreTrainedModel:
    hf = source
    if _foreign(source):
        try:
            hf = source.original_model
        except AttributeError:
            hf = None
    if not isinstance(hf, PreTrainedModel):
        held = "no model in this process" if hf is None else f"a {type(hf).__name__}"
        raise ModelError(
            f"{type(source).__name__} holds {held}, which is not a transformers model; load() takes a bridge of one "
            "that runs here"
        )
    return hf


def _original(hf: nn.Module, path: str) -> nn.Module:
    """The module that was at this path before the bridge replaced it."""
    module: nn.Module = hf
    for step in path.split(".") if path else ():
        inner = module._modules.get(step)
        if inner is None:
            raise ModelError(
                f"{type(hf).__name__}: the bridge has taken {path} away, so the model is not whole; "
                "load the model before it is bridged"
            )
        while _foreign(inner) and WRAPPED in inner._modules:
            inner = inner._modules[WRAPPED]
            assert inner is not None
        module = inner
    return module


def _share(module: nn.Module, original: nn.Module, path: str) -> None:
    """Give a module on the meta device the tensors of its original."""
    theirs = original._parameters
    # a bridge adds a bias of zeros to a language head without one; parameters that the model lacks are left out
    wanted = {name: given for name, given in module._parameters.items() if given is not None}
    fits = all(name in theirs and _shape(theirs[name]) == given.shape for name, given in wanted.items())
    if type(module) is not type(original) or not fits:
        raise ModelError(
            f"the bridge has put a {type(original).__name__} with other weights at {path or 'the top'}, where "
            f"{type(module).__name__} stood; load the model before it is bridged"
        )
    module._parameters.update({name: theirs[name] for name in wanted})
    module._buffers = original._buffers.copy()
    for name, value in vars(
        module
    ).items():  # tensors that are neither parameter nor buffer: rotary frequencies
        if isinstance(value, Tensor) and value.is_meta:
            vars(module)[name] = vars(original)[name]


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _compare(hf: PreTrainedModel, found: PreTrainedModel) -> None:
    table = found.get_input_embeddings()
    assert isinstance(table, nn.Module)
    weight = next(table.parameters())
    ids = (torch.arange(24).view(2, -1) * 7919 + 5).to(weight.device) % len(weight)
    with torch.no_grad():
        theirs, ours = (model(input_ids=ids, use_cache=False)[0] for model in (hf, found))
    close_or_refuse(
        theirs, ours, f"the {type(hf).__name__} inside of the bridge says something else than the bridge",
        ": its weights were rewritten or hooks are on it; load() it before enable_compatibility_mode() and after "
        "reset_hooks()",
        allowed=ALLOWED if weight.dtype in (torch.float32, torch.float64) else 50 * ALLOWED, least=1.0,
        error=ModelError,
    )  # fmt: skip
