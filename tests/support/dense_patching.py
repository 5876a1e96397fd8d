"""Patching the plain way: transformers' eager run, torch hooks at every site, one replacement per run.

`visited(model, ids, visit)` calls `visit(kind, layer, tensor)` at each site and goes on with what it returns: "q", "k",
"v", "z" [batch, position, head, d] (projections before rotation), "resid", "attn", "mlp" [batch, position, d_model],
"pattern" [batch, head, query, key]. Nothing here knows Headwater.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

Visit = Callable[[str, int, Tensor], Tensor]


def visited(model: PreTrainedModel, ids: Tensor, visit: Visit) -> Tensor:
    """Logits [batch, position, vocab] of a run through the visits."""
    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer, block in enumerate(blocks_of(model)):
            for handle in _hooks(model, layer, block, visit):
                stack.callback(handle.remove)
        stack.enter_context(_softmaxes(visit))
        return model(ids).logits


def seen(model: PreTrainedModel, ids: Tensor) -> dict[tuple[str, int], Tensor]:
    """What stands at every site of a plain run."""
    found: dict[tuple[str, int], Tensor] = {}

    def keep(kind: str, layer: int, tensor: Tensor) -> Tensor:
        found[kind, layer] = tensor.clone()
        return tensor

    visited(model, ids, keep)
    return found


def with_one(model: PreTrainedModel, ids: Tensor, kind: str, layer: int, place: Any, value: Tensor) -> Tensor:
    """Logits with `value` at one place of one site."""

    def change(here: str, at: int, tensor: Tensor) -> Tensor:
        if (here, at) == (kind, layer):
            tensor = tensor.clone()
            tensor[place] = value[place]
        return tensor

    return visited(model, ids, change)


def ungrouped(model: Any) -> PreTrainedModel:
    """A Llama in which every query head has keys and values of its own, equal to those that its group shared."""
    config = copy.deepcopy(model.config)
    group = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    state = {
        name: w.unflatten(0, (-1, config.head_dim)).repeat_interleave(group, 0).flatten(0, 1)
        if name.endswith(("k_proj.weight", "v_proj.weight"))
        else w
        for name, w in model.state_dict().items()
    }
    wide: Any = LlamaForCausalLM(config).eval()
    wide.to(model.dtype)
    wide.load_state_dict(state)
    wide.set_attn_implementation("eager")
    return wide


def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model whose biases are not 0."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if name.endswith("bias"):
                generator = torch.Generator().manual_seed(len(name))
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return found


def blocks_of(model: Any) -> Any:
    if hasattr(model, "transformer"):
        return model.transformer.h
    return model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers


def _hooks(model: Any, layer: int, block: Any, visit: Visit) -> Iterator[Any]:
    heads = model.config.num_attention_heads

    def entering(kind: str, count: int | None = None) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            given = args[0] if args else kwargs["hidden_states"]
            shaped = given if count is None else given.unflatten(-1, (count, -1))
            found = visit(kind, layer, shaped).reshape(given.shape)
            return ((found, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": found})

        return hook

    def leaving(kinds: str, count: int | None = None) -> Any:
        def hook(_: nn.Module, __: tuple, given_output: Any) -> Any:
            output = given_output[0] if isinstance(given_output, tuple) else given_output
            parts = output.chunk(len(kinds), -1) if count else [output]
            names = list(kinds) if count else [kinds]
            given = [p.unflatten(-1, (count, -1)) if count else p for p in parts]
            found = [visit(name, layer, p) for name, p in zip(names, given, strict=True)]
            joined = torch.cat([p.reshape(*output.shape[:-1], -1) for p in found], -1)
            return (joined, *given_output[1:]) if isinstance(given_output, tuple) else joined

        return hook

    yield block.register_forward_pre_hook(entering("resid"), with_kwargs=True)
    if hasattr(block, "attn"):
        yield block.attn.c_attn.register_forward_hook(leaving("qkv", heads))
        yield block.attn.c_proj.register_forward_pre_hook(entering("z", heads), with_kwargs=True)
        yield block.attn.c_proj.register_forward_hook(leaving("attn"))
    elif hasattr(block, "attention"):
        for kind, name in (("q", "query"), ("k", "key"), ("v", "value")):
            yield getattr(block.attention.self, name).register_forward_hook(leaving(kind, heads))
        yield block.attention.output.dense.register_forward_pre_hook(entering("z", heads), with_kwargs=True)
    else:
        shared = model.config.num_key_value_heads
        for kind, count in (("q", heads), ("k", shared), ("v", shared)):
            module = getattr(block.self_attn, f"{kind}_proj")
            yield module.register_forward_hook(leaving(kind, count))
        yield block.self_attn.o_proj.register_forward_pre_hook(entering("z", heads), with_kwargs=True)
        yield block.self_attn.o_proj.register_forward_hook(leaving("attn"))
    last = getattr(block, "post_feedforward_layernorm", None) or getattr(block, "mlp", None)
    if last is not None:
        yield last.register_forward_hook(leaving("mlp"))


@contextlib.contextmanager
def _softmaxes(visit: Visit) -> Iterator[None]:
    """Eager attention calls softmax once per layer, in the order of the layers."""
    plain, calls = nn.functional.softmax, iter(range(1000))

    def softmax(given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("dtype", None)  # the weights of a float64 model in float64
        found = plain(given, *args, **kwargs)
        return visit("pattern", next(calls), found) if given.dim() == 4 else found

    with mock.patch.object(nn.functional, "softmax", softmax):
        yield
