"""A model run edge by edge, dense and in float64, written like the definition: the oracle of edge analyses.

Every input of every head has a residual stream of its own, the sum of what each node before it says to it. Slow; knows
GPT-2, Llama, Gemma-2 and GPT-NeoX by their transformers modules, of which it takes weights, norms and rotation alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as rotate_some
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate


@dataclass
class Told:
    """`nodes` what each node says [batch, position, d], `leaves` what is added to each input's stream."""

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    nodes: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)


def run(
    hf, ids: Tensor, other=None, changed=frozenset(), kv: bool = False, embed: Tensor | None = None,
    said: dict[str, Tensor] | None = None,
) -> Told:  # fmt: skip
    """Run with `other[u]` on the `changed` edges (u, v), and with `said[u]` in the place of the output of node u.

    `kv` names keys and values by their own heads.
    """
    told, config = Told(), hf.config
    kind, heads = config.model_type, config.num_attention_heads
    few = getattr(config, "num_key_value_heads", heads)
    trunk = {"gpt2": "transformer", "gpt_neox": "gpt_neox"}.get(kind, "model")
    base = getattr(hf, trunk)
    place = torch.arange(ids.shape[1])[None]
    if kind == "gpt2":
        stream, blocks, last, out = base.wte(ids) + base.wpe(place), base.h, base.ln_f, hf.lm_head
    elif kind == "gpt_neox":
        stream, blocks, last = base.embed_in(ids), base.layers, base.final_layer_norm
        out = hf.get_output_embeddings()
    else:
        stream, blocks, last, out = base.embed_tokens(ids), base.layers, base.norm, hf.lm_head
    told.nodes["embed"] = stream if embed is None else embed
    shared = [torch.zeros_like(stream)]  # biases, which belong to no node

    def reads(receiver: str, senders: list[str]) -> Tensor:
        told.leaves[receiver] = torch.zeros_like(stream, requires_grad=True)
        told.edges += [(sender, receiver) for sender in senders]
        said = (other[u] if (u, receiver) in changed else told.nodes[u] for u in senders)
        return sum(said) + shared[0] + told.leaves[receiver]

    for layer, block in enumerate(blocks):
        before = list(told.nodes)
        norm = block.ln_1 if kind == "gpt2" else block.input_layernorm
        weights = _weights(kind, block, heads, few)
        width = weights["q"][0].shape[-1]
        turn = None if kind == "gpt2" else base.rotary_emb(stream, place)
        means = {}
        for head in range(heads):
            group = head * few // heads
            parts = {}
            for what in "qkv":
                own = f"kv{group}" if kv and what != "q" and few != heads else str(head)
                name = f"{layer}.{own}.{what}"
                if (name, what) not in means:
                    means[name, what] = norm(reads(name, before))
                weight, bias = weights[what]
                which = head if what == "q" else group
                parts[what] = means[name, what] @ weight[which] + bias[which]
            if turn is not None:
                spin = rotate_some if kind == "gpt_neox" else rotate
                parts["q"], parts["k"] = (
                    x[:, 0] for x in spin(parts["q"][:, None], parts["k"][:, None], *turn)
                )
            scale = config.query_pre_attn_scalar**-0.5 if kind == "gemma2" else width**-0.5
            scores = parts["q"] @ parts["k"].mT * scale
            if getattr(config, "attn_logit_softcapping", None):
                scores = config.attn_logit_softcapping * torch.tanh(scores / config.attn_logit_softcapping)
            far = place.mT - place
            hidden = far < 0
            types = getattr(config, "layer_types", None)
            if types is not None and types[layer] == "sliding_attention":
                hidden = hidden | (far >= config.sliding_window)
            pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            told.nodes[f"{layer}.{head}"] = pattern @ parts["v"] @ weights["o"][0][head]
        shared[0] = shared[0] + weights["o"][1]
        if kind == "gemma2":
            after, names = block.post_attention_layernorm, [f"{layer}.{head}" for head in range(heads)]
            total = sum(told.nodes[name] for name in names)
            scale = torch.where(
                total.abs() > 1e-12, after(total) / total, 0
            )  # an RMSNorm multiplies each feature
            for name in names:
                told.nodes[name] = told.nodes[name] * scale
        told.nodes |= {name: tensor for name, tensor in (said or {}).items() if name in told.nodes}
        seen = before if kind == "gpt_neox" else list(told.nodes)
        norm2 = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}.get(kind, "post_attention_layernorm")
        output = block.mlp(getattr(block, norm2)(reads(f"mlp.{layer}", seen)))
        told.nodes[f"mlp.{layer}"] = block.post_feedforward_layernorm(output) if kind == "gemma2" else output
        told.nodes |= {name: tensor for name, tensor in (said or {}).items() if name in told.nodes}
    logits = out(last(reads("logits", list(told.nodes))))
    cap = getattr(config, "final_logit_softcapping", None)
    told.logits = cap * torch.tanh(logits / cap) if cap else logits
    return told


def _weights(kind: str, block, heads: int, few: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Per head: q, k, v as ([head, d, d_head], [head, d_head]) and o as ([head, d_head, d], [d])."""
    if kind == "gpt2":
        three = block.attn.c_attn.weight.chunk(3, -1)
        biases = block.attn.c_attn.bias.chunk(3)
        found = {
            w: (_split(m, heads), b.view(heads, -1)) for w, m, b in zip("qkv", three, biases, strict=True)
        }
        last = block.attn.c_proj
        return found | {"o": (last.weight.view(heads, -1, last.weight.shape[1]), last.bias)}
    if kind == "gpt_neox":
        fused = block.attention.query_key_value
        weight = fused.weight.view(heads, 3, -1, fused.weight.shape[1]).mT
        bias = fused.bias.view(heads, 3, -1)
        found = {w: (weight[:, n], bias[:, n]) for n, w in enumerate("qkv")}
        last = block.attention.dense
    else:
        found = {}
        for what in "qkv":
            matrix = _split(getattr(block.self_attn, f"{what}_proj").weight.T, heads if what == "q" else few)
            found[what] = (matrix, matrix.new_zeros(len(matrix), matrix.shape[-1]))
        last = block.self_attn.o_proj
    bias = last.bias if last.bias is not None else last.weight.new_zeros(len(last.weight))
    return found | {"o": (last.weight.T.reshape(heads, -1, len(last.weight)), bias)}


def _split(matrix: Tensor, heads: int) -> Tensor:
    return matrix.unflatten(1, (heads, -1)).transpose(0, 1)
