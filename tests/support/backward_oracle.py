"""Backward rules written out on GPT-2 and Llama in float64: what a rule holds constant is detached in the forward pass.

Knows the transformers modules for their weights alone; no hook, no function of autograd of our own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

FACTORS = {"gim": (0.25, 0.5), "attnlrp": (0.25, 0.5)}  # of queries and keys, of values


@dataclass
class Ran:
    logits: Tensor
    embedded: Tensor
    sites: dict[tuple[str, int], Tensor] = field(
        default_factory=dict
    )  # ("residual", layer) → zeros added there
    values: dict[tuple[str, int], Tensor] = field(default_factory=dict)


def partly(x: Tensor, share: float) -> Tensor:
    """x, of which `share` has a gradient."""
    return share * x + (1 - share) * x.detach()


def product(a: Tensor, b: Tensor, rule: str) -> Tensor:
    return a * b if rule == "gradient" else partly(a * b, 0.5)


def activation(f: Any, x: Tensor, rule: str) -> Tensor:
    return f(x) if rule in ("gradient", "gim") else x * (f(x) / x).detach()


def norm(module: Any, x: Tensor, rule: str) -> Tensor:
    bias = getattr(module, "bias", None)
    if bias is not None:
        x = x - x.mean(-1, keepdim=True)
    scale = (
        x.square().mean(-1, keepdim=True) + getattr(module, "eps", 0) + getattr(module, "variance_epsilon", 0)
    ).sqrt()
    found = module.weight * x / (scale if rule == "gradient" else scale.detach())
    return found if bias is None else found + bias


def pattern(scores: Tensor, rule: str) -> Tensor:
    found = scores.softmax(-1)
    if rule == "relp":
        return found.detach()
    if rule == "gim":  # the slope of softmax(s / 2) with respect to s / 2
        slope = 2 * (scores / 2).softmax(-1)
        return found.detach() + slope - slope.detach()
    return found


def run(hf: Any, ids: Tensor, rule: str) -> Ran:
    config, gpt2 = hf.config, hf.config.model_type == "gpt2"
    base = hf.transformer if gpt2 else hf.model
    heads, few = (
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", config.num_attention_heads),
    )
    embedded = (base.wte if gpt2 else base.embed_tokens)(ids).detach().requires_grad_()
    place = torch.arange(ids.shape[1])[None]
    stream = embedded + base.wpe(place) if gpt2 else embedded
    ran = Ran(embedded, embedded)

    def site(kind: str, layer: int, x: Tensor) -> Tensor:
        ran.sites[kind, layer] = torch.zeros_like(x).requires_grad_()
        ran.values[kind, layer] = x.detach()
        return x + ran.sites[kind, layer]

    for layer, block in enumerate(base.h if gpt2 else base.layers):
        stream = site("residual", layer, stream)
        x = norm(block.ln_1 if gpt2 else block.input_layernorm, stream, rule)
        if gpt2:
            q, k, v = block.attn.c_attn(x).chunk(3, -1)
        else:
            q, k, v = (getattr(block.self_attn, f"{letter}_proj")(x) for letter in "qkv")
        q, k, v = (y.unflatten(-1, (n, -1)).transpose(1, 2) for y, n in ((q, heads), (k, few), (v, few)))
        if not gpt2:
            q, k = apply_rotary_pos_emb(q, k, *base.rotary_emb(x, place))
        scores, values = FACTORS.get(rule, (1.0, 1.0))
        q, k, v = partly(q, scores), partly(k, scores), partly(v, values)
        k, v = (y.repeat_interleave(heads // few, 1) for y in (k, v))
        seen = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(place.mT < place, -torch.inf)
        z = (pattern(seen, rule) @ v).transpose(1, 2)
        z = site("head", layer, z).flatten(2)
        written = block.attn.c_proj(z) if gpt2 else block.self_attn.o_proj(z)
        stream = stream + site("attention", layer, written)
        x = norm(block.ln_2 if gpt2 else block.post_attention_layernorm, stream, rule)
        if gpt2:
            hidden = activation(block.mlp.act, block.mlp.c_fc(x), rule)
            written = block.mlp.c_proj(hidden)
        else:
            gate = activation(torch.nn.functional.silu, block.mlp.gate_proj(x), rule)
            written = block.mlp.down_proj(product(gate, block.mlp.up_proj(x), rule))
        stream = stream + site("mlp", layer, written)
    ran.logits = hf.lm_head(norm(base.ln_f if gpt2 else base.norm, stream, rule))
    return ran


def flowing(hf: Any, ids: Tensor, rule: str, score: Any) -> tuple[Ran, dict[tuple[str, int], Tensor], Tensor]:
    """A run, what flows back to each site, and what flows back to the embeddings."""
    ran = run(hf, ids, rule)
    found = torch.autograd.grad(score(ran.logits).sum(), [*ran.sites.values(), ran.embedded])
    return ran, dict(zip(ran.sites, found[:-1], strict=True)), found[-1]
