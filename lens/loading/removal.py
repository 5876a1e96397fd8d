"""`remove_heads`: a smaller transformers model without some heads in its weights.

The rows and columns of removed heads are cut out of the projections (models/projections.py finds them), so less is
computed. The result is a plain transformers model. Before it is returned, its output is compared with that of the
original under gates of 0.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headwater.lens.attention import context
from headwater.lens.errors import ModelError, first_line
from headwater.lens.loading.smaller_config import settle
from headwater.lens.model import HookedModel
from headwater.lens.models.closeness import relative_difference
from headwater.lens.models.linear import linear, outputs
from headwater.lens.models.opened import Opened
from headwater.lens.models.parts import Shape
from headwater.lens.models.projections import attention_with_projections, projections
from headwater.lens.naming.heads import Head, Heads, chosen
from headwater.lens.samples.asked import Inputs
from headwater.lens.samples.samples import samples

# attributes of attention modules that depend on the number of heads
QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
# a table of relative position biases, which T5 computes in the first layer for all layers
TABLE = "relative_attention_bias"
FEATURES = ("split_size", "all_head_size", "inner_dim")


def remove_heads(model: HookedModel, heads: Heads | Mapping[str, Heads]) -> Any:
    """A copy of the transformers model inside `model`, without `heads` in its weights.

    Its outputs are those of `model.gated` with 0 for these heads; active edits have no effect on it. A key–value head
    is removed if all its query heads are; the other groups of a layer must lose equally many heads, because all groups
    of a layer have one size. A layer that loses all heads keeps one with output weights 0, so that caches find its
    keys. The copy runs on sdpa or eager attention. ModelError if the architecture or the choice of heads does not allow
    it.

    The heads are those of the part as which the model is read, `model.part("vision")`; `{part: heads}` takes heads out
    of several parts at once.

    `save_pretrained` writes a folder that opens again where every layer keeps equally many heads and the configuration
    has a number for them (Llama, Mistral, Qwen, Gemma, ViT …, not GPT-2; T5 if encoder, decoder and cross-attention
    keep as many); elsewhere it raises ModelError before it writes.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> smaller = hw.remove_heads(model, ["2.0", "2.1"])
    >>> smaller.model.layers[2].self_attn.q_proj.weight.shape  # 6 heads of 32 features are left
    torch.Size([192, 256])
    """
    if not isinstance(model, Opened):
        raise ModelError(f"remove_heads takes an open model, as hw.load gives it; got {type(model).__name__}")
    if model.read_only:
        raise ModelError(f"heads can not be removed from the weights of {model.name}: {model.read_only}")
    given: Mapping[Any, Heads] = heads if isinstance(heads, Mapping) else {model.part_name: heads}
    views = {name: model.part(name) for name in given}
    masks = {name: chosen(given[name], "all", view.layers, view.n_heads) for name, view in views.items()}
    smaller = copy.deepcopy(model.hf)
    paths = {module: path for path, module in model.hf.named_modules()}
    left = {name: dict(part.shapes) for name, part in model.parts.items()}
    for name, view in views.items():
        for layer, gone in masks[name].items():
            left[name][layer] = _shrink(view, layer, ~gone, smaller, paths)
        holders = {
            layer: smaller.get_submodule(paths[attention_with_projections(view, layer)])
            for layer in (view.layers if masks[name] else [])
        }
        _cut_biases(holders, masks[name], view.n_heads)
    changed = {name: [*left[name].values()] for name in views if masks[name]}
    if changed:
        settle(smaller, model, changed)
    with contextlib.ExitStack() as stack:
        for name, view in views.items():
            gates = torch.ones(1, view.n_layers, view.n_heads)
            for layer, gone in masks[name].items():
                gates[0, view.layers.index(layer), gone] = 0
            stack.enter_context(context.unedited(view.key))
            stack.enter_context(view.gated(gates))
        return _held(model, smaller)


def removable(model: HookedModel, heads: Heads) -> list[Head]:
    """The heads among `heads` that `remove_heads` can cut: whole key–value groups, and equally many of each other.

    >>> import headwater as hw
    >>> from headwater.lens.loading.removal import removable
    >>> [str(head) for head in removable(hw.load("tasks-4l"), ["2.0", "3.1"])]  # each has keys of its own
    ['2.0', '3.1']
    """
    found = []
    for layer, gone in chosen(heads, "all", model.layers, model.n_heads).items():
        groups = gone.view(model.shape(layer).kv, -1)
        whole = groups.all(1)
        each = int(groups[~whole].sum(1).min()) if not whole.all() else 0
        cut = groups & (whole[:, None] | (groups.cumsum(1) <= each))
        found += [Head(layer, head) for head in cut.flatten().nonzero()[:, 0].tolist()]
    return found


def _shrink(
    model: HookedModel, layer: int, kept: Tensor, smaller: nn.Module, paths: dict[nn.Module, str]
) -> Shape:
    """Cut one layer of the copy to the `kept` heads, bool [head], and return its new shape."""
    before = model.shape(layer)
    heads, shared = before.heads, before.kv
    silent = not kept.any()
    if silent:
        kept = torch.arange(heads) == 0
    groups = kept.view(shared, -1).sum(1)
    kept_kv = groups > 0
    if len(groups[kept_kv].unique()) > 1:
        sizes = ", ".join(map(str, groups.tolist()))
        raise ModelError(
            f"layer {layer} of {model.name} would keep {sizes} query heads of its {shared} key–value heads; "
            "remove whole groups, or equally many heads of each"
        )
    found = projections(model, layer)
    into_heads = linear(found.output)
    stored = into_heads.stored and all(linear(p.module).stored for p in (found.query, found.key, found.value))
    if not stored:
        raise ModelError(
            f"the projections of layer {layer} of {model.name} give something else than their stored weights "
            "(adapters, few bits), so no heads can be cut out of them; merge the adapters or load the weights as floats"
        )
    features: dict[nn.Module, list[Tensor]] = {}
    for part, which in ((found.query, kept), (found.key, kept_kv), (found.value, kept_kv)):
        own = part.heads(torch.arange(outputs(part.module)))[which]
        features.setdefault(part.module, []).append(own.flatten())
    for module, own in features.items():
        _keep(smaller.get_submodule(paths[module]), torch.cat(own).sort().values, outputs=True)
    output = smaller.get_submodule(paths[found.output])
    into = torch.arange(into_heads.weight.shape[0]).view(heads, -1)[kept].flatten()
    _keep(output, into, outputs=False)
    if silent:
        nn.init.zeros_(output.weight)  # type: ignore[arg-type]
    holders = {paths[m] for m in (model.attention_module(layer), attention_with_projections(model, layer))}
    for holder in holders:
        _recount(smaller.get_submodule(holder), before, int(kept.sum()), int(kept_kv.sum()))
    return before._replace(heads=int(kept.sum()), kv=int(kept_kv.sum()))


def _keep(module: Any, features: Tensor, outputs: bool) -> None:
    """Cut a linear layer to some of its output features, or of its input features."""
    axis = int(outputs) if isinstance(module, Conv1D) else int(not outputs)
    features = features.to(module.weight.device)
    module.weight = nn.Parameter(
        module.weight.detach().index_select(axis, features), module.weight.requires_grad
    )
    if outputs and module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach()[features], module.bias.requires_grad)
    names = ("nx", "nf") if isinstance(module, Conv1D) else ("in_features", "out_features")
    setattr(module, names[outputs], len(features))


def _recount(holder: Any, before: Shape, heads: int, kv: int) -> None:
    """Set the attributes of the module that count heads to the new numbers."""
    old_heads, old_kv, width, _ = before

    def change(names: Iterable[str], old: int, new: int) -> None:
        for name in names:
            if getattr(holder, name, None) == old:
                setattr(holder, name, new)

    change(QUERY_HEADS, old_heads, heads)
    change(KV_HEADS, old_kv, kv)
    change(FEATURES, old_heads * width, heads * width)
    change(("num_key_value_groups",), old_heads // old_kv, heads // kv)


def _cut_biases(holders: Mapping[int, Any], masks: Mapping[int, Tensor], heads: int) -> None:
    """Cut the tables of position biases of a stack, so that the bias of a head stays with it.

    Where not all layers keep the same heads, each gets a table of its own, and takes no bias from the layer below.
    `holders` are its attention modules by layer, `masks` bool [head] what goes.
    """
    kept = {layer: torch.nonzero(~masks.get(layer, torch.zeros(heads).bool()))[:, 0] for layer in holders}
    kept = {layer: found if len(found) else torch.tensor([0]) for layer, found in kept.items()}
    tables = {layer: getattr(holder, TABLE, None) for layer, holder in holders.items()}
    tables = {
        layer: t for layer, t in tables.items() if isinstance(t, nn.Embedding) and t.embedding_dim == heads
    }
    alone = bool(tables) and len(tables) < len(holders)  # other layers take what the first one computed
    zero = not tables and all(hasattr(holder, f"has_{TABLE}") for holder in holders.values())
    first = next(iter(tables.values()), None)
    if (alone or zero) and len({tuple(found.tolist()) for found in kept.values()}) > 1:
        for layer, holder in holders.items():
            if first is not None and layer not in tables:
                setattr(holder, TABLE, first)
                setattr(holder, f"has_{TABLE}", True)
                tables[layer] = first
            holder.forward = functools.partial(_own, holder.forward)
    for layer, table in tables.items():
        weight = table.weight.detach().index_select(1, kept[layer].to(table.weight.device))
        setattr(
            holders[layer], TABLE, nn.Embedding.from_pretrained(weight, freeze=not table.weight.requires_grad)
        )


def _own(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The layer computes its own bias: that of another layer has other heads."""
    return forward(*args, **{**kwargs, "position_bias": None})


def _held(model: HookedModel, smaller: Any) -> Any:
    """The copy on sdpa or else eager attention, whichever gives the outputs of the gated model; else ModelError."""
    sample, wanted = _probed(model)
    reason = "it gives another output"
    for name in ("sdpa", "eager"):
        try:
            smaller.set_attn_implementation(name)
            with torch.no_grad():
                found = _states(smaller, sample)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = first_line(error)
            continue
        alike = found.keys() == wanted.keys() and all(found[n].shape == wanted[n].shape for n in found)
        if alike and all(relative_difference(found[n], wanted[n]) < 2e-3 for n in found):
            return smaller
    raise ModelError(f"heads can not be removed from the weights of {type(model.hf).__name__}: {reason}")


def _probed(model: HookedModel) -> tuple[Inputs, dict[str, Tensor]]:
    """A short input that the model takes, and what it gives for it."""
    for several in samples(model.hf):
        # the second row of text has padding, at which eager attention gives other numbers
        for sample in ({name: given[:1] for name, given in several.items()}, several):
            try:
                with torch.no_grad():
                    return sample, _states(model.hf, sample)
            except Exception:  # a guess that the model does not take
                continue
    raise ModelError(
        f"heads can not be removed from the weights of {model.name}: no short input runs through it"
    )


def _states(hf: Any, sample: Inputs) -> dict[str, Tensor]:
    """The last hidden state of each stack, and all other numbers that the model gives."""
    found: dict[str, Tensor] = {}
    for name, value in hf(**sample, output_hidden_states=True).items():
        value = value[-1] if name.endswith("hidden_states") and isinstance(value, tuple) else value
        if isinstance(value, Tensor) and value.is_floating_point():
            found[name] = value.float()
    return found
