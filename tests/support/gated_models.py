"""Small random models whose attention has an output gate, and the gate by the formula of each architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "head_dim": 8, "layer_types": ["full_attention"] * 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3Next": EXPERTS, "Qwen3_5": {}, "Afmoe": {**EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1},
    "Laguna": EXPERTS, "Lfm3": {"use_attention_gate": True},
}  # fmt: skip


def gated(name: str) -> Any:
    """The model, with weights so large that gates are far from one half."""
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}ForCausalLM")
    model = kind._from_config(kind.config_class(**SHAPE | CONFIGS[name]), attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in key:
                weight.mul_(4)
    return model


def attention_of(hf: Any, layer: int) -> Any:
    """The attention module of a layer."""
    return next(
        m for path, m in hf.named_modules() if path.endswith(f".{layer}.self_attn") and hasattr(m, "q_proj")
    )


def _half(attention: Any, x: Tensor) -> Tensor:
    both = attention.q_proj(x).view(*x.shape[:2], 4, 16)
    return torch.sigmoid(both[..., 8:])


def _features(attention: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(attention.gate_proj(x)).view(*x.shape[:2], 4, 8)


def _softplus(attention: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(attention.g_proj(x)).view(*x.shape[:2], 4, -1)


def _heads(attention: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(attention.g_proj(x))[..., None]


# (attention module, its input [batch, position, d_model]) → factors [batch, position, head, d_head or 1]
FORMULAS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Qwen3Next": _half, "Qwen3_5": _half, "Afmoe": _features, "Laguna": _softplus, "Lfm3": _heads,
}  # fmt: skip


def dense(hf: Any, name: str, ids: Tensor, layer: int) -> dict[str, Tensor]:
    """From hooks on the eager model: `weights` [batch, head, query, key], `value` [batch, head, key, d], `gate`
    [batch, head, query, d], `z` (gated) and `W_O` [head, d, d_model]."""
    attention, kept = attention_of(hf, layer), {}
    hooks = [
        attention.register_forward_pre_hook(
            lambda m, args, kwargs: kept.update(x=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        attention.v_proj.register_forward_hook(lambda m, args, out: kept.update(v=out)),
        attention.o_proj.register_forward_pre_hook(lambda m, args: kept.update(z=args[0])),
    ]
    with torch.no_grad():
        weights = hf(input_ids=ids, output_attentions=True, use_cache=False).attentions
        for hook in hooks:
            hook.remove()
        gate = FORMULAS[name](attention, kept["x"]).expand(-1, -1, 4, 8).transpose(1, 2)
    value = kept["v"].view(*ids.shape, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
    return {
        "weights": weights[layer].double(), "value": value.double(), "gate": gate.double(),
        "z": kept["z"].view(*ids.shape, 4, 8).transpose(1, 2).double(),
        "W_O": attention.o_proj.weight.detach().T.reshape(4, 8, -1).double(),
    }  # fmt: skip
