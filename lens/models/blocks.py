"""The modules of a transformer block by role (norms, attention, MLP), whatever the architecture calls them.

`block(model, layer)` finds them by the module names that transformers commonly uses. The names are guesses: a caller
that needs the residual stream to add up verifies it on a short input (attention output + MLP output must equal the
change of the stream), as edits/residual.py and transformer_lens/names.py do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwater.lens.errors import ModelError
from headwater.lens.models.opened import Opened

NORM_BEFORE_ATTENTION = (
    "ln_1", "input_layernorm", "self_attn_layer_norm", "layernorm_before", "layer_norm1", "attn_norm", "sa_layer_norm",
)  # fmt: skip
NORM_BEFORE_MLP = (
    "pre_feedforward_layernorm", "ln_2", "layernorm_after", "layer_norm2", "mlp_norm", "final_layer_norm",
    "post_attention_layernorm",
)  # fmt: skip
NORM_AFTER_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")
NORM_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "output")
# of an MLP: its first linear layer; the second one of a gated MLP, which is multiplied with the first; the last
MLP_IN = ("gate_proj", "c_fc", "fc1", "dense_h_to_4h", "up_proj", "w1", "lin1")
MLP_LINEAR = ("up_proj", "w3")
MLP_OUT = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "lin2")
POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
FINAL = ("ln_f", "norm", "final_layer_norm", "final_layernorm", "final_norm")


@dataclass(frozen=True, eq=False)
class TransformerBlock:
    """The modules of one block; None where the block has none or its name is not known.

    The output of `attention_out` and of `mlp_out` is added to the residual stream. Where a norm follows the attention
    or the MLP (Gemma 2, OLMo 2), it is that norm.
    """

    module: nn.Module
    attention: nn.Module
    norm1: nn.Module | None
    norm2: nn.Module | None
    attention_out: nn.Module
    mlp: nn.Module | None
    mlp_out: nn.Module | None
    mlp_first: nn.Module | None
    mlp_linear: nn.Module | None
    mlp_last: nn.Module | None


def block(model: Opened, layer: int) -> TransformerBlock:
    """The block of one layer: the entry of a ModuleList that contains the layer's attention module."""
    inner = model.attention_module(layer)
    path = next(name for name, module in model.hf.named_modules() if module is inner)
    steps = path.split(".")
    place = next((n for n in range(len(steps) - 1, 0, -1) if steps[n].isdigit()), None)
    if place is None or place + 1 >= len(steps):
        raise ModelError(f"{type(inner).__name__} (layer {layer}) does not stand in a list of blocks")
    around = model.hf.get_submodule(".".join(steps[: place + 1]))
    attention = around.get_submodule(steps[place + 1])
    norm1 = first(around, NORM_BEFORE_ATTENTION)
    after = output_norm(around)
    norm2 = first(around, NORM_BEFORE_MLP)
    norm2 = None if norm2 is after else norm2
    mlp = first(around, MLP)
    holder = around if first(around, ("fc1",)) is not None else mlp
    gated = first(holder, ("gate_proj", "w1")) is not None
    last = first(holder, MLP_OUT)
    return TransformerBlock(
        around, attention, norm1, norm2, attention if after is None else after,
        mlp=mlp if mlp is not None else last,
        mlp_out=first(around, NORM_AFTER_MLP) or (last if holder is around else mlp),
        mlp_first=first(holder, MLP_IN), mlp_linear=first(holder, MLP_LINEAR) if gated else None, mlp_last=last,
    )  # fmt: skip


def output_norm(around: nn.Module) -> nn.Module | None:
    """The norm on the attention's output; None where there is none.

    Llama gives the same name, post_attention_layernorm, to the norm before its MLP; that one is not meant.
    """
    found = first(around, NORM_AFTER_ATTENTION)
    ours = (
        hasattr(around, "post_self_attn_layernorm")
        or hasattr(around, "pre_feedforward_layernorm")
        or first(around, NORM_BEFORE_ATTENTION) is None
    )
    return found if ours else None


def final_norm(hf: nn.Module) -> nn.Module | None:
    """The norm between the last block and the language head."""
    base = getattr(hf, "base_model", hf)
    trunks = (hf, base, getattr(base, "decoder", None))
    return next((n for t in trunks if isinstance(t, nn.Module) if (n := first(t, FINAL)) is not None), None)


def position_tables(hf: nn.Module) -> list[nn.Module]:
    """The tables of learned absolute positions."""
    named = [m for path, m in hf.named_modules() if path.rpartition(".")[2] in POSITIONS]
    return [module for module in named if isinstance(module, nn.Embedding)]


def first(module: nn.Module | None, names: tuple[str, ...]) -> nn.Module | None:
    """The first child of one of these names."""
    if module is None:
        return None
    children = (getattr(module, name, None) for name in names)
    return next((child for child in children if isinstance(child, nn.Module)), None)


def norm_gain(norm: nn.Module | None, width: int) -> Tensor:
    """The gain [width] of a LayerNorm or RMSNorm, however it is stored (Gemma stores gain - 1); ones for no norm.

    Measured, not read: a vector of alternating ±1000 has mean 0 and root mean square 1000, large beside epsilon, so the
    norm returns ±gain + bias.
    """
    return torch.ones(width) if norm is None else _affine(norm, width)[0]


def norm_bias(norm: nn.Module | None, width: int) -> Tensor:
    """The bias [width] of a LayerNorm; zeros for RMSNorm and for no norm."""
    return torch.zeros(width) if norm is None else _affine(norm, width)[1]


def _affine(norm: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    like = next(norm.parameters(), torch.empty(0))
    probe = torch.full((width,), 1000.0, dtype=like.dtype, device=like.device)
    probe[1::2] = -1000.0
    with torch.no_grad():
        up, down = norm(probe), norm(-probe)
        return ((up - down) / (2 * probe.sign())).float(), ((up + down) / 2).float()


def takes_mean_out(norm: nn.Module, width: int) -> bool:
    """Whether the norm subtracts the mean: LayerNorm gives the same for x and x + 1, RMSNorm does not."""
    like = next(norm.parameters(), torch.empty(0))
    probe = torch.linspace(-1, 1, width, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        return bool(torch.allclose(norm(probe), norm(probe + 1), atol=1e-2))


def epsilon(norm: nn.Module) -> float:
    """The epsilon that the norm adds to the variance."""
    return float(getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0)
