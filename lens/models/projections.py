"""The query, key, value and output projections of an attention module, and which features belong to which head.

A `Projection` is a module and a view that splits the last axis of a tensor, its features, into [head, d_head]. The same
view works on an activation, a weight and a bias. Weights are what the module gives (linear.py): with adapters and with
quantised weights they are the effective ones.

Known layouts: GPT-2 and GPT-BigCode (c_attn), separate q_proj, k_proj, v_proj (Llama, Mistral, Qwen, Gemma, OPT, Phi,
GPT-OSS, OLMo, Cohere, Granite, ViT, CLIP …), Phi-3 (qkv_proj), GPT-NeoX, BLOOM and Falcon (query_key_value), ModernBERT
and MPT (Wqkv), towers of packed patches (qkv), BERT-like (query, key, value; also VideoMAE and YOLOS), DistilBERT
(q_lin …), T5 (q, k, v, o). Any other raises ModelError: low-rank projections (DeepSeek) have no matrix per head. An
output gate (running/output_gates.py) is found by its shape: a module that gives one number per head or per feature
(AFMoE, LFM3), or the second half of what the query projection gives for each head (Qwen3-Next).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwater.lens.errors import ModelError
from headwater.lens.models.linear import linear, outputs
from headwater.lens.models.opened import Opened
from headwater.lens.models.parts import Shape


class Projection(NamedTuple):
    """A module, the view [..., feature] → [..., head, d_head] of its features for one of q, k, v, and its path."""

    module: nn.Module
    heads: Callable[[Tensor], Tensor]
    path: str = ""

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """The matrix [d_model, head, d_head] and the bias [head, d_head], to be read and not written to."""
        found = linear(self.module, self.path)
        return self.heads(found.weight), None if found.bias is None else self.heads(found.bias)


@dataclass(frozen=True, eq=False)
class Projections:
    """The views give queries [.., head, d_head], keys and values [.., kv head, d_head]; `output` mixes the heads.

    `gate` gives what an output gate is the activation of, [.., head, d_value] or [.., head, 1]; None without one.
    """

    query: Projection
    key: Projection
    value: Projection
    output: nn.Module
    gate: Projection | None = None


def projections(model: Opened, layer: int) -> Projections:
    """The projections of one layer's attention; ModelError for an unknown layout."""
    return _found(model, layer)[1]


def attention_with_projections(model: Opened, layer: int) -> nn.Module:
    """The module that holds all four projections; in BERT it is the parent of the module that computes attention."""
    return _found(model, layer)[0]


def _found(model: Opened, layer: int) -> tuple[nn.Module, Projections]:
    inner = model.attention_module(layer)
    if isinstance(getattr(inner, "logit_scale", None), nn.Parameter):
        raise ModelError(
            f"the scores of {type(inner).__name__} (layer {layer}) are cosines of queries and keys, which no product "
            "of weights gives; use a record"
        )
    shape = model.shape(layer)
    names = {module: name for name, module in model.hf.named_modules()}
    for path in (names[inner], names[inner].rpartition(".")[0]):
        module = model.hf.get_submodule(path)
        layout = next((make for parts, make in LAYOUTS.items() if all(_has(module, p) for p in parts)), None)
        if layout is not None:
            found = layout(module, shape)
            query, gate = _ungated(module, found, shape)
            parts = (query, found.key, found.value)
            query, key, value = (part._replace(path=names[part.module]) for part in parts)
            gate = None if gate is None else gate._replace(path=names[gate.module])
            return module, _checked(Projections(query, key, value, found.output, gate), shape, module, layer)
    raise ModelError(
        f"the attention weights of {type(inner).__name__} (layer {layer}) are not in a known layout"
    )


def _ungated(attention: nn.Module, found: Projections, shape: Shape) -> tuple[Projection, Projection | None]:
    """The queries alone, and the gate beside them."""
    query = found.query
    if query.module not in (found.key.module, found.value.module):
        width = outputs(query.module)
        if width == 2 * shape.heads * shape.d_head:
            halves = (lambda x, n=n: x.unflatten(-1, (shape.heads, 2, -1))[..., n, :] for n in (0, 1))
            own, gate = (query._replace(heads=half) for half in halves)
            return own, gate
    known = {query.module, found.key.module, found.value.module, found.output}
    for name, module in attention.named_children():
        fits = GATE.search(name) and module not in known and _inputs(module) == _inputs(query.module)
        if fits and outputs(module) % shape.heads == 0:
            return query, Projection(module, lambda x: x.unflatten(-1, (shape.heads, -1)))
    return query, None


def _inputs(module: nn.Module) -> int:
    return int(getattr(module, "in_features", -1))


def _checked(found: Projections, shape: Shape, module: nn.Module, layer: int) -> Projections:
    """Refuse a layout whose shapes do not match the heads of this model."""
    for name, part, heads in (
        ("query", found.query, shape.heads),
        ("key", found.key, shape.kv),
        ("value", found.value, shape.kv),
    ):
        features = outputs(part.module)
        try:
            seen = tuple(part.heads(torch.empty(1, features)).shape[1:])
        except RuntimeError:
            seen = (features,)
        if len(seen) != 2 or seen[0] != heads or (name != "value" and seen[1] != shape.d_head):
            raise ModelError(
                f"the {name} projection of {type(module).__name__} (layer {layer}) gives {list(seen)} features, not "
                f"[{heads} heads, {shape.d_head}]; its attention weights are not in a known layout"
            )
    return found


def _has(module: Any, path: str) -> bool:
    for part in path.split("."):
        module = getattr(module, part, None)
        if module is None:
            return False
    return True


def _fused(fused: nn.Module, output: nn.Module, take: Callable[[Tensor, int], Tensor]) -> Projections:
    """q, k and v from one fused module; `take(features, n)` gives part n of the three."""
    query, key, value = (Projection(fused, lambda x, n=n: take(x, n)) for n in range(3))
    return Projections(query, key, value, output)


def _one_after_another(x: Tensor, n: int, shape: Shape) -> Tensor:
    """Part n of features stored as all queries, then all keys, then all values."""
    ends = (0, shape.heads, shape.heads + shape.kv, shape.heads + 2 * shape.kv)
    # a slice, not torch.split: autograd forbids writing in place to one of several views
    return x.unflatten(-1, (ends[-1], -1))[..., ends[n] : ends[n + 1], :]


def _c_attn(attention: Any, shape: Shape) -> Projections:
    if hasattr(attention, "q_attn"):
        raise ModelError(f"{type(attention).__name__} is cross-attention; its weights are not read")
    if getattr(attention, "multi_query", None) is False:  # GPT-BigCode keeps each head's q, k, v together
        return _head_by_head("c_attn", "c_proj")(attention, shape)
    return _joined("c_attn", "c_proj")(attention, shape)


def _joined(fused: str, output: str) -> Layout:
    """All queries, then all keys, then all values."""
    return lambda attention, shape: _fused(
        getattr(attention, fused), getattr(attention, output), lambda x, n: _one_after_another(x, n, shape)
    )


def _clipped(attention: Any, shape: Shape) -> Projections:
    if getattr(attention, "clip_qkv", None):
        raise ModelError(
            f"{type(attention).__name__} clips its queries, keys and values; they are not linear"
        )
    return _joined("Wqkv", "out_proj")(attention, shape)


def _query_key_value(attention: Any, shape: Shape) -> Projections:
    """GPT-NeoX and BLOOM keep each head's q, k, v together; Falcon has one key and value behind all queries."""
    alone = getattr(attention, "multi_query", False) and not attention.new_decoder_architecture
    return (_joined if alone else _head_by_head)("query_key_value", "dense")(attention, shape)


def _head_by_head(fused: str, output: str) -> Layout:
    """Of each head its query, its key, its value."""
    return lambda attention, shape: _fused(
        getattr(attention, fused), getattr(attention, output),
        lambda x, n: x.unflatten(-1, (shape.heads, 3, -1))[..., n, :],
    )  # fmt: skip


def _separate(query: str, key: str, value: str, *outputs: str) -> Layout:
    def layout(attention: Any, shape: Shape) -> Projections:
        last = next((name for name in outputs if _has(attention, name)), None)
        if last is None:
            raise ModelError(f"the output projection of {type(attention).__name__} is not known")
        q, k, v = (
            Projection(attention.get_submodule(name), lambda x, count=count: x.unflatten(-1, (count, -1)))
            for name, count in ((query, shape.heads), (key, shape.kv), (value, shape.kv))
        )
        return Projections(q, k, v, attention.get_submodule(last))

    return layout


GATE = re.compile(r"^g_|gate")
SEPARATE = (
    ("self.query", "self.key", "self.value", "output.dense"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
    ("query", "key", "value", "dense"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("q", "k", "v", "o"),
)
# (attention module, shape) → its projections
Layout = Callable[[Any, Shape], Projections]
LAYOUTS: dict[tuple[str, ...], Layout] = {
    ("c_attn", "c_proj"): _c_attn,
    ("q_proj", "k_proj", "v_proj"): _separate("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "dense"),
    ("qkv_proj", "o_proj"): _joined("qkv_proj", "o_proj"),
    ("Wqkv", "Wo"): _joined("Wqkv", "Wo"),
    ("Wqkv", "out_proj"): _clipped,
    ("qkv", "proj"): _joined("qkv", "proj"),
    ("qkv", "projection"): _joined("qkv", "projection"),
    ("query_key_value", "dense"): _query_key_value,
    **{names: _separate(*names) for names in SEPARATE},
}
