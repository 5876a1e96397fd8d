"""Weight matrices per head of an attention layer, under the same names for every architecture.

Activations are row vectors: `q = x @ W_Q[h] + b_Q[h]`, `z = a @ v`, `out = Σ_h z[h] @ W_O[h] + b_O`. `head_weights` can
fold in the norm before the attention, centre, and repeat keys and values per query head. projections.py lists the known
layouts; any other raises ModelError. Adapters and quantised weights count: linear.py says how a matrix is found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwater.lens.errors import ModelError
from headwater.lens.models import blocks
from headwater.lens.models.linear import linear, table
from headwater.lens.models.norms import norm_bias, norm_gain, takes_mean_out
from headwater.lens.models.opened import Opened
from headwater.lens.models.projections import projections


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """Copies in float32 (float64 for a float64 model); a bias that the layer lacks is zeros.

    `kv_head` is the number of key–value heads, or of query heads after `expand=True`. `d_read` is d_model, but for
    layers that read the embedding beside the stream (Zamba2).
    """

    W_Q: Float[Tensor, "head d_read d_head"]
    W_K: Float[Tensor, "kv_head d_read d_head"]
    W_V: Float[Tensor, "kv_head d_read d_value"]
    W_O: Float[Tensor, "head d_value d_model"]
    b_Q: Float[Tensor, "head d_head"]
    b_K: Float[Tensor, "kv_head d_head"]
    b_V: Float[Tensor, "kv_head d_value"]
    b_O: Float[Tensor, " d_model"]


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The matrices of one layer, one per query head, without biases.

    `gain` is the gain of the norm before the attention (ones if there is none), and `centred` whether that norm takes
    the mean of the stream out (LayerNorm). A norm on the attention's output (Gemma 2, OLMo 2) is folded into `output`.
    """

    query: Float[Tensor, "head d_read d_head"]
    key: Float[Tensor, "head d_read d_head"]
    value: Float[Tensor, "head d_read d_value"]
    output: Float[Tensor, "head d_value d_model"]
    gain: Float[Tensor, " d_read"]
    centred: bool


def head_weights(
    model: Opened, layer: int, *, fold: bool = False, centre: bool = False, expand: bool = False
) -> HeadWeights:
    """The weights of attention layer `layer`.

    `fold` moves gain and bias of the norm before the attention into W_Q, W_K, W_V and their biases, which then apply to
    the normalised stream without gain. A norm after the attention (Gemma 2, OLMo 2) is not folded. `centre` then
    subtracts the mean over d_model from every matrix that reads or writes the stream. LayerNorm removes that mean
    anyway; RMSNorm does not, so RMSNorm models raise ModelError. `expand` repeats keys and values per query head.
    """
    if centre and not fold:
        raise ModelError("centre=True needs fold=True: only a folded norm's input has no mean")
    found = projections(model, layer)
    parts = {"Q": found.query.weights(), "K": found.key.weights(), "V": found.value.weights()}
    read = {name: _copy(weight).movedim(1, 0) for name, (weight, _) in parts.items()}
    bias = {
        name: read[name].new_zeros(read[name].shape[::2]) if own is None else _copy(own)
        for name, (_, own) in parts.items()
    }
    out = linear(found.output, f"the output projection of layer {layer}")
    write = _copy(out.weight).unflatten(0, (model.shape(layer).heads, -1))
    write_bias = write.new_zeros(write.shape[-1]) if out.bias is None else _copy(out.bias)
    if fold:
        before, _ = _norms(model, layer)
        gain, shift = (f(before, read["Q"].shape[1]).to(write) for f in (norm_gain, norm_bias))
        bias = {n: bias[n] + torch.einsum("d,hde->he", shift, read[n]) for n in bias}
        read = {n: gain[:, None] * weight for n, weight in read.items()}
        if centre:
            _refuse_rms(model, before)
            read = {n: weight - weight.mean(1, keepdim=True) for n, weight in read.items()}
            write, write_bias = write - write.mean(-1, keepdim=True), write_bias - write_bias.mean()
    shape = model.shape(layer)
    if expand and (group := shape.heads // shape.kv) > 1:
        for name in ("K", "V"):
            read[name], bias[name] = (x.repeat_interleave(group, 0) for x in (read[name], bias[name]))
    q, k, v = (read[name].contiguous() for name in "QKV")
    return HeadWeights(q, k, v, write, bias["Q"], bias["K"], bias["V"], write_bias)


def layer_weights(model: Opened, layer: int) -> LayerWeights:
    """The weights of attention layer `layer`, one matrix per query head, for QK and OV circuits."""
    found = head_weights(model, layer, expand=True)
    before, after = _norms(model, layer)
    read, written = found.W_Q.shape[1], found.W_O.shape[-1]
    output = found.W_O
    if after is not None and takes_mean_out(after, written):
        output = output - output.mean(-1, keepdim=True)
    output = output * norm_gain(after, written).to(output)
    gain = norm_gain(before, read).to(found.W_Q)
    centred = before is not None and takes_mean_out(before, read)
    return LayerWeights(found.W_Q, found.W_K, found.W_V, output, gain, centred)


def mean_is_lost(model: Opened) -> bool:
    """Whether no part of the model sees the mean over d_model of what its heads write: LayerNorm is before each reader.

    In blocks that end in a norm (BERT), each sum goes through a LayerNorm.
    """
    if model.is_encoder_decoder or model.mixers:
        return False
    readers: list[nn.Module | None] = []
    for layer in model.layers:
        block, flow = blocks.block(model, layer), model.flows.get(layer)
        if flow is None:
            return False
        if flow.ends:
            readers += {norm for norm in flow.reads.values() if norm is not None} or [None]
        else:
            before_mlp = flow.reads.get(block.mlp) if block.norm2 is None and block.mlp else block.norm2
            readers += [block.norm1, before_mlp]
            readers += [blocks.final_norm(model)] if layer == model.layers[-1] else []
    return all(norm is not None and takes_mean_out(norm, model.d_model) for norm in readers)


def triangle(thin: Tensor) -> Tensor:
    """R of the QR decomposition of [..., d_model, d_head]; `R_1 R_2ᵀ` has the singular values of the whole product."""
    return torch.linalg.qr(thin, mode="r").R


def circuit_ends(model: Opened) -> tuple[Float[Tensor, "vocab d_model"], Float[Tensor, "d_model written"]]:
    """Token embedding [vocab, d_model] and unembedding [d_model, written] with the last norm's gain folded in.

    `written` tokens have logits; where fewer do than are read, they come first. Where that norm takes the mean out
    (LayerNorm), the unembedding does not see it either.
    """
    if not model.has_lm_head:
        raise ModelError(f"{model.name} has no language head; load a causal language model")
    embedding, head = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    embed, unembed = (
        table(embedding, model.vocab).float(),
        linear(head, "the language head").weight.detach().float(),
    )
    if embed.shape[1] != unembed.shape[0]:
        raise ModelError(
            f"{model.name} embeds in {embed.shape[1]} dimensions and reads out from {unembed.shape[0]}"
        )
    if model.head_flow is None or not model.head_flow.reads:
        raise ModelError(
            f"the language head of {model.name} reads neither the stream nor its last norm (a layer is between), so it "
            "has no unembedding of the stream"
        )
    last = blocks.final_norm(model)
    unembed = unembed * norm_gain(last, unembed.shape[0]).to(unembed)[:, None]
    if last is not None and takes_mean_out(last, unembed.shape[0]):
        unembed = unembed - unembed.mean(0, keepdim=True)
    return embed, unembed


def _copy(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.dtype == torch.float64 else tensor.float().clone()


def _norms(model: Opened, layer: int) -> tuple[nn.Module | None, nn.Module | None]:
    """The norms before and after the attention of a layer; None where there is none."""
    found = projections(model, layer)
    block = blocks.attention_norms(model, layer, (found.query.module, found.key.module, found.value.module))
    return block.norm1, None if block.attention_out is block.attention else block.attention_out


def _refuse_rms(model: Opened, norm: nn.Module | None) -> None:
    if norm is None or not takes_mean_out(norm, model.d_model):
        what = "has no norm in front of its attention" if norm is None else f"has {type(norm).__name__}"
        raise ModelError(
            f"{model.name} {what}, which keeps the mean of the stream; centre=True is for LayerNorm models"
        )
