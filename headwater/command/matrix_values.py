"""Independent ways that take values and weight matrices: of attention with `v_proj` and the like, one module for each.

Each raises LookupError for a layer of another make (fused projections, gates, norms on values or on what attention
writes), so that the analysis counts as having run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.analyses._prompts.examples import repeated_tokens
from headwater.analyses.heads.head_roles import bos_token
from headwater.command.matrix_calls import SMALL
from headwater.command.matrix_plain import Plain
from headwater.lens.loading.coverage import attentions

Pairs = Iterator[tuple[Any, Any]]
OTHER = (
    "gate_proj",
    "v_norm",
    "q_a_proj",
)  # attention that has more between values and output, or makes them otherwise
BEHIND = ("post_feedforward_layernorm", "post_self_attn_layernorm", "post_attn_norm")


def parts_of(plain: Plain, layer: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """The projections of queries, keys, values and outputs."""
    module = plain.attention[layer]
    if any(hasattr(module, name) for name in OTHER) or not hasattr(module, "v_proj"):
        raise LookupError(f"{type(module).__name__} has no plain values")
    out = plain.projections[layer]
    if _matrix(module.q_proj).shape[1] != _matrix(out).shape[0]:
        raise LookupError(f"{type(module).__name__} has more than queries in q_proj")
    return module.q_proj, module.k_proj, module.v_proj, out


def _matrix(module: Any) -> Tensor:
    """What a module multiplies by, [in, out], from what it gives for each unit vector: adapters and bits included."""
    weight = next(module.parameters())
    width = module.in_features
    units = torch.eye(width, dtype=weight.dtype if weight.is_floating_point() else torch.float32)
    with torch.no_grad():
        return (module(units) - module(units * 0)).double()


def circuits(plain: Plain, layer: int) -> tuple[Tensor, Tensor]:
    """W_Q W_Kᵀ and W_V W_O of each head, [head, d_model, d_model]; gains of the zoo's norms are 1."""
    block = plain.hf.get_submodule(plain.paths[layer].rpartition(".")[0])
    norms = [m for name, m in block.named_children() if "norm" in name]
    if not norms or not all("RMS" in type(m).__name__ for m in norms):
        raise LookupError("a norm that takes the mean out")
    query, key, value, out = (_matrix(module) for module in parts_of(plain, layer))
    split = [w.unflatten(1, (-1, out.shape[0] // plain.heads)).movedim(1, 0) for w in (query, key, value)]
    query, key, value = (w.repeat_interleave(plain.heads // len(w), 0) for w in split)
    return query @ key.mT, value @ out.unflatten(0, (plain.heads, -1))


def circuit_rank(plain: Plain, found: Any) -> Pairs:
    for layer in range(len(plain.attention)):
        for name, circuit in zip(("qk", "ov"), circuits(plain, layer), strict=True):
            ours = found.singular_values.sel(circuit=name)[layer]
            yield ours, torch.linalg.svdvals(circuit)[:, : ours.sizes["direction"]]


def composition(plain: Plain, found: Any) -> Pairs:
    both = [circuits(plain, layer) for layer in range(len(plain.attention))]
    for low, high in itertools.combinations(range(len(both)), 2):
        (_, sent), (qk, ov) = both[low], both[high]
        for kind, circuit in (("q", qk), ("k", qk.mT), ("v", ov)):
            joined = torch.linalg.matrix_norm(sent[:, None] @ circuit)
            sizes = torch.linalg.matrix_norm(sent)[:, None] * torch.linalg.matrix_norm(circuit)
            yield found.score.sel(composition=kind)[low, :, high], joined / sizes


def head_roles(plain: Plain, found: Any) -> Pairs:
    model, length = plain.subject.model, SMALL["length"]
    ids = repeated_tokens(model, length, SMALL["sequences"], 0, bos_token(model))
    query = torch.arange(ids.shape[1] - length, ids.shape[1])
    for layer, dense in enumerate(attentions(plain.hf, {"input_ids": ids})[model.part_name]):
        for role, key in (
            ("previous", query - 1),
            ("duplicate", query - length),
            ("induction", query - length + 1),
            ("first", query * 0),
        ):
            yield found.sel(role=role)[layer], dense[:, :, query, key].mean((0, 2))


# --- terms of the stream


def values(plain: Plain, layer: int) -> Tensor:
    """v of each query head, [batch, head, position, d]."""
    *_, value, out = parts_of(plain, layer)
    kept: list[Any] = []
    handle = value.register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.no_grad():
        plain.run(plain.subject.examples)
    handle.remove()
    split = kept[0].unflatten(-1, (-1, _matrix(out).shape[0] // plain.heads)).movedim(2, 1)
    return split.repeat_interleave(plain.heads // split.shape[1], 1)


def streams(plain: Plain) -> list[Tensor]:
    """The stream that enters each layer of the model, [batch, position, d]."""
    kept: list[Any] = []
    blocks = [plain.hf.get_submodule(path.rpartition(".")[0]) for path in plain.paths]
    if any(hasattr(each, name) for each in blocks for name in BEHIND) or hasattr(
        blocks[0], "residual_multiplier"
    ):
        raise LookupError("a norm or factor behind attention")
    names = [name for name, _ in blocks[0].named_children()]
    if not any("input_layernorm" in name or name == "ln_1" for name in names):
        raise LookupError("no norm in front of attention")
    take = [each.register_forward_pre_hook(lambda _, args: kept.append(args[0])) for each in blocks]
    with torch.no_grad():
        plain.run(plain.subject.examples)
    for handle in take:
        handle.remove()
    return kept


def terms(plain: Plain) -> list[Tensor]:
    """Σ_h A_ij v_j W_O + 1[i=j] x_i of each layer, [batch, query, key, d]."""
    found = []
    for layer, (dense, stream) in enumerate(zip(plain.weights_of_examples, streams(plain), strict=True)):
        out = _matrix(parts_of(plain, layer)[-1]).unflatten(0, (plain.heads, -1))
        written = torch.einsum("bhij,bhjd,hdm->bijm", dense.double(), values(plain, layer).double(), out)
        identity = torch.eye(stream.shape[1], dtype=torch.float64)[None, :, :, None]
        found.append(written + identity * stream.double()[:, :, None])
    return found


def norms(plain: Plain, found: Any) -> Pairs:
    for layer, each in enumerate(terms(plain)):
        yield found.norm[:, layer, 0], each[:, -1].norm(dim=-1)


def _product(maps: list[Tensor]) -> Tensor:
    product = torch.eye(maps[0].shape[-1], dtype=torch.float64).expand_as(maps[0])
    for each in maps:
        product = each @ product
    return product[:, -1]


def globenc(plain: Plain, found: Any) -> Pairs:
    yield found[:, 0], _product([each.norm(dim=-1) for each in terms(plain)])


def alti(plain: Plain, found: Any) -> Pairs:
    maps = []
    for layer, each in enumerate(terms(plain)):
        bias = getattr(parts_of(plain, layer)[-1], "bias", None)
        whole = each.sum(2) + (0 if bias is None else bias.detach())
        near = whole.abs().sum(-1)[:, :, None] - (whole[:, :, None] - each).abs().sum(-1)
        maps.append(near.clamp_min(0) / near.clamp_min(0).sum(-1, keepdim=True))
    yield found[:, 0], _product(maps)


def value_zeroing(plain: Plain, found: Any) -> Pairs:
    blocks = [plain.hf.get_submodule(path.rpartition(".")[0]) for path in plain.paths]
    maps = []
    for layer, block in enumerate(blocks):
        module = parts_of(plain, layer)[2]
        before = block_output(plain, block)
        columns = []
        for token in range(before.shape[1]):

            def without(_: Any, __: Any, output: Tensor, token: int = token) -> Tensor:
                output = output.clone()
                output[:, token] = 0
                return output

            handle = module.register_forward_hook(without)
            columns.append(1 - torch.cosine_similarity(before, block_output(plain, block), dim=-1))
            handle.remove()
        changes = torch.stack(columns, -1).double()
        changes = torch.where(plain.weights_of_examples[layer].sum(1) > 0, changes, 0.0)
        maps.append(changes / changes.sum(-1, keepdim=True))
    yield found[:, 0], _product(maps)


def block_output(plain: Plain, block: nn.Module) -> Tensor:
    """What a block gives, [batch, position, d]."""
    kept: list[Any] = []
    handle = block.register_forward_hook(
        lambda _, __, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        plain.run(plain.subject.examples)
    handle.remove()
    return kept[0]


def sink_contribution(plain: Plain, found: Any) -> Pairs:
    for layer, dense in enumerate(plain.weights_of_examples):
        v = values(plain, layer).double()
        taken = (dense[..., :1].double() * v[:, :, :1]).norm(dim=-1)
        share = taken / (dense.double() @ v).norm(dim=-1)
        asked = (dense[..., 0] > 0) & (dense[..., 1:] > 0).any(-1)
        yield found.share.sel(of="sinks")[:, layer], share.masked_fill(~asked, np.nan).nanmean(-1)


VALUE_WAYS: dict[str, Callable[[Plain, Any], Pairs]] = {
    each.__name__: each
    for each in (
        circuit_rank,
        composition,
        head_roles,
        norms,
        globenc,
        alti,
        value_zeroing,
        sink_contribution,
    )
}
