"""The modules of a transformer block by role (norms, attention, MLP), whatever the architecture calls them.

`block(model, layer)` finds norms by what they do: the attention reads the output of the one, the MLP that of the other,
as a run at loading showed (`Flow` of norms.py). The MLP is found by the names that transformers commonly uses, else by
what the block's stack lists. Names are guesses: a caller that needs the residual stream to add up verifies it on a
short input (attention output + MLP output must equal the change of the stream), as edits/residual.py and
transformer_lens/names.py do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from headwater.lens.errors import ModelError
from headwater.lens.models.norms import Flow
from headwater.lens.models.opened import Opened
from headwater.lens.models.stack import block_around, entry

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
    """The block of one layer: the entry of a ModuleList that contains the layer's attention module.

    ModelError where the block is not in a list, or hands on several streams at once (Gemma 3n), which no caller reads.
    """
    refuse_several_streams(model)
    inner, flow = model.attention_module(layer), model.flows.get(layer, Flow({}, {}))
    around, inside = block_around(model.hf, model.stack, inner), entry(model.hf, inner)
    if around is None or inside is None:
        raise ModelError(
            f"{type(inner).__name__} (layer {layer}) does not stand in a list of blocks, so what runs around it is not "
            "known; give a model of transformers whose blocks stand in a list"
        )
    attention = next(child for child in inside.children() if inner in set(child.modules()))
    norm1 = next((flow.reads[module] for module in inner.modules() if module in flow.reads), None)
    mlp = first(around, MLP) or _listed_mlp(model, around)
    holder = around if first(around, ("fc1",)) is not None else mlp
    gated = first(holder, ("gate_proj", "w1")) is not None
    last = first(holder, MLP_OUT)
    reader = first(holder, MLP_IN) if holder is around else mlp
    norm2 = flow.reads.get(reader) if reader is not None else None
    after = flow.behind.get(attention)
    if reader not in flow.reads:  # YOLOS: what stands for the MLP is its last layer
        norm2 = next((norm for norm in flow.reads.values() if norm not in (None, norm1, after)), None)
    after = None if after is norm2 else after  # BLOOM: what the attention module gives is the stream
    # one norm serves attention and MLP side by side; in BERT norms stand behind the sums
    norm2 = None if norm2 is norm1 or flow.ends else norm2
    written = last if holder is around else mlp
    return TransformerBlock(
        around, attention, norm1, norm2, attention if after is None else after,
        mlp=mlp if mlp is not None else last,
        mlp_out=flow.behind.get(written, written) if written is not None else None,
        mlp_first=first(holder, MLP_IN), mlp_linear=first(holder, MLP_LINEAR) if gated else None, mlp_last=last,
    )  # fmt: skip


def refuse_several_streams(model: Opened) -> None:
    """ModelError where the blocks hand on more than one stream."""
    several = next((each for each in model.stack if each.axes > 3), None)
    if several is not None:
        raise ModelError(
            f"the blocks of {model.name} hand on a tensor of {several.axes} axes, such as several streams at once, and "
            "not [batch, position, d_model], so the residual stream can not be read or changed"
        )


def _listed_mlp(model: Opened, around: nn.Module) -> nn.Module | None:
    """The one MLP that the stack lists for a block."""
    own = [block for block in model.stack if model.hf.get_submodule(block.path) is around]
    paths = [step.path for block in own for step in block.steps if step.kind == "mlp"]
    return model.hf.get_submodule(paths[0]) if len(paths) == 1 else None


def attention_norms(model: Opened, layer: int, readers: Iterable[nn.Module]) -> TransformerBlock:
    """The block of a layer whose `readers`, the projections to q, k and v, all read its `norm1`; else ModelError."""
    found, flow = block(model, layer), model.flows.get(layer, Flow({}, {}))
    if any(reader not in flow.reads or flow.reads[reader] is not found.norm1 for reader in readers):
        raise ModelError(
            f"what the attention of layer {layer} of {model.name} reads is neither the stream nor one norm of it, so "
            "no gain can be folded into its weights; weights(layer, fold=False) gives them as they are"
        )
    return found


def final_norm(model: Opened) -> nn.Module | None:
    """The norm between the last block and the language head; None if there is none or it is not known.

    A model without a language head has no reader to tell; its norm is found by name.
    """
    if model.head_flow is not None:
        return next(iter(model.head_flow.reads.values()), None)
    hf = model.hf
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
