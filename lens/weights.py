"""Per-head weight matrices of an attention layer, whatever the architecture calls them.

Rows multiply from the left as in the field's formulas: `q = x @ query[h]`, `z = a @ v`, `out += z[h] @
output[h]`. Known layouts: GPT-2 (c_attn, c_proj), Llama-like (q_proj … o_proj or out_proj or dense: Llama,
Mistral, Qwen, Gemma, OPT, GPT-OSS, Phi), Phi-3 (qkv_proj), GPT-NeoX (query_key_value), BERT-like (query, key,
value). With grouped queries keys and values are repeated to one per query head. Biases are left out; an
unknown layout is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.errors import ModelError
from headwater.lens.model import HookedModel

# (model, attention module) -> query, key, value [d_model, heads·d_head], output [heads·d_head, d_model]
Layout = Callable[[HookedModel, Any], tuple[Tensor, ...]]
BEFORE = ("ln_1", "input_layernorm", "self_attn_layer_norm", "layernorm_before", "layer_norm1")
FINAL = ("ln_f", "norm", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """`query`, `key`, `value` are [head, d_model, d_head], `output` is [head, d_head, d_model], all float32
    copies.

    `gain` [d_model] is that of the norm in front of the attention (ones where there is none in front). A norm
    on the attention's output (Gemma 2, OLMo 2) has its gain folded into `output`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    gain: Tensor


def layer_weights(model: HookedModel, layer: int) -> LayerWeights:
    """The weights of attention layer `layer`, one matrix per query head."""
    block, attention, layout = _place(model, layer)
    query, key, value, output = (matrix.detach().float() for matrix in layout(model, attention))
    heads, groups = model.n_heads, model.n_kv_heads
    per_head = {
        "query": query.unflatten(1, (heads, -1)).movedim(1, 0),
        "key": key.unflatten(1, (groups, -1)).movedim(1, 0).repeat_interleave(heads // groups, 0),
        "value": value.unflatten(1, (groups, -1)).movedim(1, 0).repeat_interleave(heads // groups, 0),
        "output": output.unflatten(0, (heads, -1)) * _output_gain(block, output),
    }
    before = next((getattr(block, name) for name in BEFORE if hasattr(block, name)), None)
    return LayerWeights(**per_head, gain=norm_gain(before, query.shape[0]).to(query))


def circuit_ends(model: HookedModel) -> tuple[Tensor, Tensor]:
    """Token embedding [vocab, d_model] and unembedding [d_model, vocab] with the last norm's gain folded
    in."""
    embedding, head = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    if head is None:
        raise ModelError(f"{model.name} has no language head; load a causal language model")
    embed, unembed = embedding.weight.detach().float(), head.weight.detach().float().T
    if embed.shape[1] != unembed.shape[0]:
        raise ModelError(
            f"{model.name} embeds in {embed.shape[1]} dimensions and reads out from {unembed.shape[0]}"
        )
    last = next(
        (getattr(trunk, name) for trunk in _trunks(model.hf) for name in FINAL if hasattr(trunk, name)), None
    )
    return embed, unembed * norm_gain(last, unembed.shape[0]).to(unembed)[:, None]


def norm_gain(norm: nn.Module | None, width: int) -> Tensor:
    """The gain of a LayerNorm or RMSNorm however it is stored (Gemma keeps gain - 1); ones for no norm.

    A vector of alternating ±1 has mean 0 and deviation 1, so a norm gives it back times its gain, plus its
    bias.
    """
    if norm is None:
        return torch.ones(width)
    like = next(norm.parameters(), torch.empty(0))
    probe = torch.ones(width, dtype=like.dtype, device=like.device)
    probe[1::2] = -1
    with torch.no_grad():
        return ((norm(probe) - norm(-probe)) / (2 * probe)).float()


def _output_gain(block: nn.Module, output: Tensor) -> Tensor:
    """Gain of a norm on the attention's output. Llama gives the same name to the norm before its MLP."""
    after = getattr(block, "post_attention_layernorm", None)
    is_after = hasattr(block, "pre_feedforward_layernorm") or not any(hasattr(block, name) for name in BEFORE)
    return norm_gain(after if is_after else None, output.shape[1]).to(output)


def _trunks(hf: nn.Module) -> list[nn.Module]:
    """The modules that may hold the last norm: the model, its base model and that one's decoder."""
    base = getattr(hf, "base_model", hf)
    return [trunk for trunk in (hf, base, getattr(base, "decoder", None)) if isinstance(trunk, nn.Module)]


def _place(model: HookedModel, layer: int) -> tuple[nn.Module, nn.Module, Layout]:
    """The block of a layer, its attention with all four projections, and the layout these have."""
    modules = dict(model.hf.named_modules())
    inner = model.attention_module(layer)
    name = next(path for path, module in modules.items() if module is inner)
    # BERT's inner module holds query, key and value; the one around it has the output projection as well
    for path in (name, name.rpartition(".")[0]):
        if (layout := layout_of(modules[path])) is not None:
            return modules[path.rpartition(".")[0]], modules[path], layout
    raise ModelError(
        f"the attention weights of {type(inner).__name__} (layer {layer}) are not in a known layout"
    )


def layout_of(module: nn.Module) -> Layout | None:
    """The function that reads this attention module's projections, if its parts are known."""
    for parts, layout in LAYOUTS.items():
        if all(_has(module, part) for part in parts):
            return layout
    return None


def _has(module: nn.Module, path: str) -> bool:
    for part in path.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def _gpt2(model: HookedModel, attention: Any) -> tuple[Tensor, ...]:
    query, key, value = attention.c_attn.weight.chunk(3, dim=1)  # Conv1D keeps [in, out]
    return query, key, value, attention.c_proj.weight


def _separate(model: HookedModel, attention: Any) -> tuple[Tensor, ...]:
    last = next((name for name in ("o_proj", "out_proj", "dense") if hasattr(attention, name)), None)
    if last is None:
        raise ModelError(f"the output projection of {type(attention).__name__} is not known")
    return *(attention.get_submodule(f"{part}_proj").weight.T for part in "qkv"), attention.get_submodule(
        last
    ).weight.T


def _phi3(model: HookedModel, attention: Any) -> tuple[Tensor, ...]:
    sizes = [count * model.d_head for count in (model.n_heads, model.n_kv_heads, model.n_kv_heads)]
    return *attention.qkv_proj.weight.T.split(sizes, dim=1), attention.o_proj.weight.T


def _neox(model: HookedModel, attention: Any) -> tuple[Tensor, ...]:
    parts = attention.query_key_value.weight.T.unflatten(1, (model.n_heads, 3, -1))
    return *(parts[:, :, part].flatten(1) for part in range(3)), attention.dense.weight.T


def _bert(model: HookedModel, attention: Any) -> tuple[Tensor, ...]:
    own = attention.self
    return *(
        own.get_submodule(part).weight.T for part in ("query", "key", "value")
    ), attention.output.dense.weight.T


LAYOUTS: dict[tuple[str, ...], Layout] = {
    ("c_attn", "c_proj"): _gpt2,
    ("q_proj", "k_proj", "v_proj"): _separate,
    ("qkv_proj", "o_proj"): _phi3,
    ("query_key_value", "dense"): _neox,
    ("self.query", "self.key", "self.value", "output.dense"): _bert,
}
