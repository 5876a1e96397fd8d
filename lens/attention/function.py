"""The attention function and the mask function that transformers calls for `attn_implementation="headwater"`.

The mask function returns a `LazyMask`, which only describes the mask: no queries × keys tensor is built. The attention
function looks up which layer of which model called it and applies the edits, taps and listeners of the caller's context
(`context.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from headwater.kernels.edits.outputs import Gate, OutputEdit
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import alike, backward_rules, context, packed, shortening, windows
from headwater.lens.attention.context import NAME
from headwater.lens.attention.masks import LazyMask, crossing, given_mask, lazy_mask
from headwater.lens.attention.own_rule import own_rule
from headwater.lens.errors import ModelError
from headwater.lens.progress import heed


class Site(NamedTuple):
    """Where an attention module stands in a model.

    `model` is the key of its part, `layer` its layer number, `place` its index among the part's layers. `rows` is the
    key of the part whose self-attention gives the positions of the queries: cross-attention takes these from the
    decoder. It is None in parts without cross-attention.
    """

    model: object
    layer: int
    place: int
    rows: object = None


NOTHING = context.Lowered()
_sites: WeakKeyDictionary[nn.Module, Site] = WeakKeyDictionary()
_decoder: ContextVar[tuple[object, Mask | None]] = ContextVar("headwater_decoder", default=(None, None))


@torch.compiler.disable  # a compiled call would replay the edits of the run that was traced
@backward_rules.plainly
def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: LazyMask | Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    s_aux: Tensor | None = None, position_bias: Tensor | None = None, is_causal: bool | None = None,
    output_attentions: bool | None = None, **_: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention as transformers calls it: q, k, v [batch, head, position, d_head] → [batch, query, head, d_head].

    In this order: the active edits are lowered for this layer; score edits enter the rule; `attend` computes z with the
    weight edits; output edits and gates change z; listeners get the map, v and z. Taps are called between these steps.

    Who runs the transformers model with `output_attentions=True` gets the dense weights beside z, [batch, head, query,
    key], with gradients where torch tracks them; rows of padding are zero.
    """
    heed()
    if dropout:
        raise ModelError(
            f"the model is in training mode with attention dropout {dropout}, so attention is random; call model.eval()"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    site, own = _sites.get(module), own_rule(module)
    grid = windows.grid(module, query, site is not None)
    simple = softcap is None and s_aux is None and position_bias is None and not output_attentions
    if simple and own is None and grid is None and site is not None and site.rows is None:
        z = alike.attended(site.model, site.layer, query, key, value, attention_mask, float(scale))
        if z is not None:
            return z, None
    layer, tap = (-1, context.NO_TAP) if site is None else (site.layer, context.current_tap(site.model))
    call = None if site is None else shortening.of(site.model, site.layer)
    short = None if call is None or call.short is None else call.short.fitting(key.shape[2])
    edits_on = () if site is None else context.active(site.model)
    narrow = None
    dense = bool(output_attentions) and grid is None
    if grid is None:
        sizes = (query.shape[2], key.shape[2]) if short is None else short.sizes(attention_mask)
        mask, bias = _mask_of(module, *sizes, attention_mask, is_causal)
        if position_bias is not None:
            bias = position_bias if bias is None else bias + position_bias
        if short is not None:
            free = bias is None and own is None and not dense and not _watched(site, edits_on)
            narrow = short.narrowed(mask) if free else None
            mask = short.hidden(mask)
            if narrow is None:
                query, key, value = short.spread(query, key, value, mask)
        query, key, value = tap.entering(layer, query, key, value)
    else:
        mask, bias = grid.mask(), None
        query, key, value = tap.entering(layer, *(grid.unfolded(x) for x in (query, key, value)))
        query, key = grid.biased(query, key, scale, attention_mask)
        scale = 1.0
    mask = mask if site is None or site.rows is None else _placed(site, mask)
    lowered = NOTHING
    if edits_on:
        lowered = context.Lowered.joined([edit.lower(layer, mask, len(query)) for edit in edits_on])
    normaliser, weights = lowered.normaliser, lowered.weights
    if normaliser is not None and normaliser.name == "softmax":
        normaliser = None
    rule = ScoreRule(
        float(scale), narrow or mask, softcap, s_aux, bias, lowered.scores, normaliser=normaliser
    )
    rule = rule if own is None else own.applied(query, rule)
    for adapter in lowered.adapters:
        rule, weights = adapter(query, key, rule, weights)
    rule = tap.scoring(layer, query, key, rule)
    listeners = [] if site is None else context.listeners(site.model)
    wanted = tuple(dict.fromkeys(name for listener in listeners for name in listener.statistics))
    backend = context.current_backend()
    tracked = torch.is_grad_enabled() and (dense or any(listener.grad for listener in listeners))
    try:
        z, map = backward_rules.attended(query, key, value, rule, weights, backend, wanted, tracked)
    except ValueError as error:
        if backend == "auto":
            raise
        raise ModelError(f"model.using({backend!r}): {error}") from None
    z = tap.weighing(layer, z if own is None else own.added(z, map, rule), map, value)
    z = tap.leaving(layer, _outputs(z, site, rule.mask, lowered.outputs))
    context.discover(module, map)
    if call is not None and call.tell is not None:
        call.tell(mask, map, value, None if narrow is None or short is None else short.columns)
    for listener in listeners:
        listener.take(layer, map, value, z)
    if short is not None and narrow is None:
        z = short.held(z)
    z = z.transpose(1, 2)
    attentions = map.dense().to(query.dtype) if dense else None
    return (z.contiguous() if grid is None else grid.folded(z)), attentions


def _placed(site: Site, mask: Mask) -> Mask:
    """The mask of cross-attention with the query positions and padding of the decoder's self-attention.

    A decoder block runs self-attention before cross-attention, so `_decoder` holds the mask of the same block.
    """
    if site.rows is site.model:
        _decoder.set((site.model, mask))
        return mask
    key, own = _decoder.get()
    if key is not site.rows or own is None or own.queries != mask.queries:
        own = Mask(mask.queries, mask.queries)
    return crossing(mask, own)


def _outputs(z: Tensor, site: Site | None, mask: Mask, edits: Sequence[OutputEdit]) -> Tensor:
    """z after the output edits, in their order, and then the gates."""
    if edits:
        start, _ = mask.real("query")
        positions = torch.arange(mask.queries)[None] + mask.query_offset - start[:, None]
        for edit in edits:
            z = edit.apply(z, positions)
    if site is not None and (gates := context.current_gates(site.model)) is not None:
        z = Gate(gates[:, site.place]).apply(z, torch.empty(0))
    return z


def _watched(site: Site | None, edits: Sequence[context.ActiveEdit]) -> bool:
    """Whether anybody looks at the attention of a layer or changes it, beside edits that make its sequence shorter."""
    if site is None:
        return False
    return (
        bool(context.listeners(site.model))
        or context.current_tap(site.model) is not context.NO_TAP
        or context.current_gates(site.model) is not None
        or not all(edit.shortens for edit in edits)
    )


def _mask_of(
    module: nn.Module, queries: int, keys: int, given: LazyMask | Tensor | None, is_causal: bool | None
) -> tuple[Mask, Tensor | None]:
    """The mask of this call, and an additive bias where a tensor mask came that the interface did not make."""
    if isinstance(given, LazyMask):
        mask = given.mask
        bias = None if given.bias is None else given.bias[..., :keys]
        if (mask.queries, mask.keys) == (queries, keys):
            return mask, bias
        if mask.queries == queries and mask.keys > keys:
            return mask.trimmed(0, keys), bias
        raise ModelError(
            f"{type(module).__name__} was given a mask for {mask.queries}×{mask.keys} positions but attends over "
            f"{queries}×{keys}; this architecture can not be read"
        )
    if given is None:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        right = 0 if causal and queries > 1 else None
        return Mask(queries, keys, right=right, documents=packed.documents(module, keys)), None
    return given_mask(given[..., :keys], queries)


def register() -> None:
    """Register both functions with transformers; called once, when this module is imported."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lazy_mask)


register()


def register_layers(modules: Mapping[nn.Module, int], rows: object = None, tells: bool = False) -> object:
    """Register the attention modules of one part with their layer numbers, and return the key of the part.

    A module registered before keeps its key, so that edits switched on through an earlier `HookedModel` of the same
    weights still apply. `rows` is the key of the part that gives the query positions; `tells=True` means that this part
    gives them itself, to its own cross-attention.
    """
    known = [_sites[m] for m in modules if m in _sites]
    key = known[0].model if known else object()
    order = sorted(modules.values())
    for module, layer in modules.items():
        _sites[module] = Site(key, layer, order.index(layer), key if tells else rows)
    return key
