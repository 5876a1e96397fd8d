"""What attention mixes in one part of a plain float64 model: dense vectors and changed runs, by hooks on modules.

It shares no code with Headwater: the modules of every family are named here, from transformers' source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# (block, attention, values, output, norm, whether the norm stands behind the sum)
CLIP = ("self_attn", "v_proj", "out_proj", "layer_norm1", False)
SPEECH = ("v_proj", "out_proj")
MODULES = {
    ("vit_classifier", "vision"): (
        "vit.layers.{}",
        "attention",
        "v_proj",
        "o_proj",
        "layernorm_before",
        False,
    ),
    ("clip", "vision"): ("vision_model.encoder.layers.{}", *CLIP),
    ("clip", "text"): ("text_model.encoder.layers.{}", *CLIP),
    ("llava", "vision"): ("model.vision_tower.encoder.layers.{}", *CLIP),
    ("llava", "text"): (
        "model.language_model.layers.{}",
        "self_attn",
        "v_proj",
        "o_proj",
        "input_layernorm",
        False,
    ),
    ("t5", "encoder"): ("encoder.block.{}", "layer.0.SelfAttention", "v", "o", "layer.0.layer_norm", False),
    ("t5", "decoder"): ("decoder.block.{}", "layer.0.SelfAttention", "v", "o", "layer.0.layer_norm", False),
    ("t5", "cross"): ("decoder.block.{}", "layer.1.EncDecAttention", "v", "o", "layer.1.layer_norm", False),
}
MODULES["blip2", "cross"] = (
    "qformer.encoder.layer.{}", "crossattention", "attention.value", "output.dense", "crossattention.output.LayerNorm",
    True,
)  # fmt: skip
for family, behind in (("bart", True), ("whisper", False)):
    for part, name in (("encoder", "self_attn"), ("decoder", "self_attn"), ("cross", "encoder_attn")):
        stack = "encoder" if part == "encoder" else "decoder"
        where = (f"model.{stack}.layers.{{}}", name, "v_proj", "out_proj", f"{name}_layer_norm", behind)
        MODULES[family, part] = where


@dataclass
class Mixed:
    """One layer on one row: `heads` A·f [head, query, key, d], the stream `x` [query, d] that the attention is added
    to, `whole`, the sum after the norm behind it if there is one, and `through`, that norm's linear part on terms of
    the sum [query, …, d]."""

    heads: Tensor
    x: Tensor
    whole: Tensor
    through: Callable[[Tensor], Tensor]


@torch.no_grad()
def layers(hf: Any, family: str, part: str, given: dict[str, Tensor], count: int = 2) -> list[Mixed]:
    """Every layer of one row."""
    block, attention, values, out, norm, behind = MODULES[family, part]
    found = []
    for layer in range(count):
        around = block.format(layer)
        module = hf.get_submodule(f"{around}.{attention}")
        v, o = (hf.get_submodule(f"{around}.{attention}.{name}") for name in (values, out))
        beside = hf.get_submodule(f"{around}.{norm}")
        inner = getattr(module, "attention", module)
        kept = _seen([inner, v, o, beside], lambda: hf(**given, output_attentions=True))
        weights = next(x for x in reversed(kept[inner][1]) if isinstance(x, Tensor) and x.dim() == 4)[0]
        count_of = len(weights)
        value = kept[v][1][0].unflatten(-1, (-1, o.weight.shape[1] // count_of)).movedim(1, 0)
        value = value.repeat_interleave(count_of // len(value), 0)
        rows = o.weight.detach().T.unflatten(0, (count_of, -1))
        heads = torch.einsum("hqk,hkd,hdm->hqkm", weights, value, rows)
        attended = kept[o][1][0]
        if not behind:
            x = kept[beside][0][0]
            found.append(Mixed(heads, x, x + attended, lambda terms: terms))
            continue
        summed = kept[beside][0][0]
        spread = (summed.var(-1, correction=0) + beside.eps).sqrt()

        def through(terms: Tensor, spread: Tensor = spread, beside: Any = beside) -> Tensor:
            scale = spread.view(-1, *[1] * (terms.dim() - 1))
            return beside.weight.detach() * (terms - terms.mean(-1, keepdim=True)) / scale

        found.append(Mixed(heads, summed - attended, kept[beside][1][0], through))
    return found


def without_values(hf: Any, family: str, part: str, given: dict[str, Tensor], layer: int) -> Tensor:
    """1 - cos of the block's output with the values of each token at zero in one layer, [query, token]."""
    block, attention, values, *_ = MODULES[family, part]
    around = hf.get_submodule(block.format(layer))
    v = hf.get_submodule(f"{block.format(layer)}.{attention}.{values}")

    def output() -> Tensor:
        found = _seen([around], lambda: hf(**given))[around][1]
        return (found if isinstance(found, Tensor) else found[0])[0]

    clean = output()
    tokens = _seen([v], lambda: hf(**given))[v][1].shape[1]
    changes = []
    for token in range(tokens):

        def zero(module: Any, args: Any, out: Tensor, token: int = token) -> Tensor:
            out = out.clone()
            out[:, token] = 0
            return out

        handle = v.register_forward_hook(zero)
        try:
            changes.append(1 - torch.cosine_similarity(clean, output(), dim=-1))
        finally:
            handle.remove()
    return torch.stack(changes, 1)


@torch.no_grad()
def _seen(modules: list[Any], run: Callable[[], Any]) -> dict[Any, tuple[Tensor, Any]]:
    """What each module was given first and what it gave."""
    found: dict[Any, tuple[Tensor, Any]] = {}

    def keep(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        found[module] = (args[0] if args else kwargs.get("hidden_states"), out)

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found
