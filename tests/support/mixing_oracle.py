"""What attention mixes, as dense vectors in float64, written out for each architecture from its modules by name.

Nothing here is shared with Headwater: hidden states and maps are those transformers returns, projections and norms are
read off the modules of GPT-2, Llama-like models, Gemma 2, GPT-OSS and BERT by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Layer:
    """One text, one layer: `heads` A·f [head, query, key, d], then `attention`, `residual`, `behind` the norm and
    `encoded` through both [query, key, d], and `whole`, what the model has after attention [query, d]."""

    heads: Tensor
    attention: Tensor
    residual: Tensor
    behind: Tensor
    encoded: Tensor
    whole: Tensor
    left_out: Tensor  # what biases add to Σ_j behind


def blocks_of(twin: Any) -> Any:
    if hasattr(twin, "transformer"):
        return twin.transformer.h
    return twin.bert.encoder.layer if hasattr(twin, "bert") else twin.model.layers


@torch.no_grad()
def layers(twin: Any, ids: Tensor) -> list[Layer]:
    """Every layer of one text [position]."""
    found = twin(ids[None], output_attentions=True, output_hidden_states=True)
    states = zip(blocks_of(twin), found.attentions, found.hidden_states, strict=False)
    return [_layer(block, maps[0], x[0]) for block, maps, x in states]


def product(maps: list[Tensor]) -> Tensor:
    """The last map times … times the first."""
    found = torch.eye(len(maps[0]), dtype=torch.float64)
    for layer in maps:
        found = layer @ found
    return found


def layers_of_encoder(twin: Any, ids: Tensor) -> list[Layer]:
    """The same for a bare BertModel, which has no head above it."""

    class Wrapped:
        bert = twin

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return twin(*args, **kwargs)

    return layers(Wrapped(), ids)


def _layer(block: Any, weights: Tensor, x: Tensor) -> Layer:
    value, out, bias, scale = _values(block, weights, x)
    heads = torch.einsum("hqk,hkd,hdm->hqkm", weights, value, out) * scale
    attention = heads.sum(0)
    residual = attention.clone()
    residual[range(len(x)), range(len(x))] += x
    if not hasattr(block, "intermediate"):
        whole = residual.sum(1) + bias
        return Layer(heads, attention, residual, residual, residual, whole, bias.detach())
    first, second = block.attention.output.LayerNorm, block.output.LayerNorm
    before = residual.sum(1) + bias
    mixed = first(before)
    behind = _linear(first, residual, before)
    summed = mixed + block.output.dense(block.intermediate(mixed))
    return Layer(
        heads, attention, residual, behind, _linear(second, behind, summed), mixed, mixed - behind.sum(1)
    )


def _values(block: Any, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values [head, key, d_head], W_O [head, d_head, d], what biases add [query, d], row scales [query, 1, d]."""
    count, one = len(weights), torch.ones(len(x), 1, x.shape[-1], dtype=torch.float64)
    if hasattr(block, "attn"):
        values = block.attn.c_attn(block.ln_1(x)).chunk(3, -1)[2]
        return _split(values, count), _rows(block.attn.c_proj.weight, count), block.attn.c_proj.bias, one
    if hasattr(block, "intermediate"):
        dense = block.attention.output.dense
        return _split(block.attention.self.value(x), count), _rows(dense.weight.T, count), dense.bias, one
    own = block.self_attn
    values = own.v_proj(block.input_layernorm(x))
    groups = values.shape[-1] // own.head_dim
    value = _split(values, groups).repeat_interleave(count // groups, 0)
    out = _rows(own.o_proj.weight.T, count)
    bias = torch.zeros_like(x) if own.o_proj.bias is None else own.o_proj.bias.expand_as(x)
    if hasattr(block, "pre_feedforward_layernorm"):  # Gemma 2 norms what the attention gives
        norm = block.post_attention_layernorm
        given = torch.einsum("hqk,hkd,hdm->qm", weights, value, out)
        scale = (1 + norm.weight) / (given.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        return value, out, bias, scale[:, None]
    return value, out, bias, one


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).movedim(1, 0)


def _rows(weight: Tensor, heads: int) -> Tensor:
    return weight.unflatten(0, (heads, -1))


def _linear(norm: Any, terms: Tensor, whole: Tensor) -> Tensor:
    """A layer norm's linear part on terms [query, key, d] of sums [query, d]."""
    spread = (whole.var(-1, correction=0) + norm.eps).sqrt()
    return norm.weight * (terms - terms.mean(-1, keepdim=True)) / spread[:, None, None]
