"""What the parts of a model add at one position, in float64 and the plain way: transformers' eager run and torch hooks.

For GPT-2, Llama and Gemma 2 of `tiny_models`, and GPT-NeoX's parallel blocks. Nothing here knows Headwater.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Ends:
    """At one position: `heads` [layer, text, head, d], `mlp` and `entering` [layer, text, d], `last` [text, d]."""

    heads: Tensor
    mlp: Tensor
    entering: Tensor
    last: Tensor
    norm: Any
    unembed: Tensor

    def along(self, direction: Tensor) -> Tensor:
        """What a vector is multiplied with for its share of `direction` [text, d] of the logits, the scale frozen."""
        weight = self.norm.weight.detach()
        if isinstance(self.norm, torch.nn.LayerNorm):
            deviation = (self.last.var(-1, correction=0) + self.norm.eps).sqrt()
            pulled = weight * direction
            return (pulled - pulled.mean(-1, keepdim=True)) / deviation[:, None]
        gain = 1 + weight if type(self.norm).__name__.startswith("Gemma") else weight
        epsilon = getattr(self.norm, "variance_epsilon", getattr(self.norm, "eps", None))
        return gain * direction / (self.last.square().mean(-1) + epsilon).sqrt()[:, None]

    def against_mean(self, tokens: Tensor) -> Tensor:
        return self.along(self.unembed[tokens] - self.unembed.mean(0))

    def against(self, tokens: Tensor, wrong: Tensor) -> Tensor:
        return self.along(self.unembed[tokens] - self.unembed[wrong])


def ends(twin: Any, ids: Tensor, position: int = -1) -> Ends:
    """Of texts of one length."""
    body = twin.base_model
    stack = body.h if hasattr(body, "h") else body.layers
    norm = next(getattr(body, n) for n in ("ln_f", "norm", "final_layer_norm") if hasattr(body, n))
    seen: dict[Any, Tensor] = {}
    handles = [norm.register_forward_pre_hook(lambda _, given: seen.__setitem__("last", given[0]))]
    for n, block in enumerate(stack):
        handles += _listen(seen, n, block, twin.config.num_attention_heads)
    with torch.no_grad():
        twin(ids)
    for handle in handles:
        handle.remove()

    def stacked(kind: str) -> Tensor:
        return torch.stack([seen[kind, n][:, position] for n in range(len(stack))]).detach()

    head = twin.get_output_embeddings().weight.detach()
    return Ends(stacked("heads"), stacked("mlp"), stacked("entering"), seen["last"][:, position], norm, head)


def _listen(seen: dict[Any, Tensor], n: int, block: Any, heads: int) -> list[Any]:
    attention = next(getattr(block, a) for a in ("attn", "self_attn", "attention") if hasattr(block, a))
    output = next(getattr(attention, a) for a in ("c_proj", "o_proj", "dense") if hasattr(attention, a))
    behind = (
        getattr(block, "post_attention_layernorm", None)
        if hasattr(block, "pre_feedforward_layernorm")
        else None
    )
    mlp = getattr(block, "post_feedforward_layernorm", None) or block.mlp

    def entering(_: Any, args: tuple, kwargs: dict) -> None:
        seen["entering", n] = args[0] if args else kwargs["hidden_states"]

    def written(_: Any, given: tuple) -> None:
        z = given[0].unflatten(-1, (heads, -1))
        weight = output.weight if type(output).__name__ == "Conv1D" else output.weight.T
        each = torch.einsum("bshe,hed->bshd", z, weight.unflatten(0, (heads, -1)))
        if behind is not None:  # Gemma 2 divides what attention adds by its length
            whole = each.sum(2)
            scale = (whole.square().mean(-1) + behind.eps).sqrt()
            each = each * (1 + behind.weight) / scale[..., None, None]
        seen["heads", n] = each

    def added(_: Any, __: tuple, result: Any) -> None:
        seen["mlp", n] = result

    return [
        block.register_forward_pre_hook(entering, with_kwargs=True),
        output.register_forward_pre_hook(written), mlp.register_forward_hook(added),
    ]  # fmt: skip
