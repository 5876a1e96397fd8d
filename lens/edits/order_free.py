"""Position-invariant attention to documents (PINE, Wang et al. 2024, from its public code).

Documents attend to each other in both directions. Every query in a document or after the documents reads them as if
they were sorted by importance, the most important nearest; importance is the query's attention to a document without
positions. So permuting the documents changes later tokens only by rounding. The model needs rotary positions that can
be removed from queries and keys, and no window. This is checked on equal tokens: without positions their queries and
keys must be equal. One text at a time. Cost: a dense queries × keys table per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwater.kernels.edits.weights import WeightEdit
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.rule import ScoreRule
from headwater.lens.attention import context
from headwater.lens.attention.context import Lowered
from headwater.lens.attention.module_hooks import on
from headwater.lens.edits.base import Edit, LayerCall, ModuleHook, Prepared
from headwater.lens.edits.named_positions import NO_GROUPS, Names
from headwater.lens.errors import EditError
from headwater.lens.models import inputs
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import compares
from headwater.lens.naming.positions import Positions
from headwater.lens.running import ids
from headwater.lens.running.forward import forward

__all__ = ["PositionInvariant"]

PROBE = 6  # equal tokens on which the model is checked
_angles: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("headwater_angles", default=None)


class Rotary(NamedTuple):
    """cos and sin of the rotary angles, [position, d_rotary / 2], without the scale that some models multiply in."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor) -> Rotary:
        cos, sin = cos[0].detach().double(), sin[0].detach().double()
        size = (cos.square() + sin.square()).sqrt()
        half = cos.shape[-1] // 2
        if not cos[:, :half].equal(cos[:, half:]):  # most models give each angle twice, GPT-OSS once
            half = cos.shape[-1]
        return cls((cos / size)[:, :half], (sin / size)[:, :half])

    def turn(self, x: Tensor, places: Tensor, back: bool = False) -> Tensor:
        """x [..., position, d_head] rotated by the angles of positions `places` [..., position]; `back` undoes it."""
        half = self.cos.shape[-1]
        cos, sin = self.cos[places], self.sin[places] * (-1 if back else 1)
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


@dataclass(frozen=True, eq=False)
class PositionInvariant(Edit):
    """Read `documents`, adjacent pairs [first, end) of positions, as if they had no order.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> texts = "Mary gave John a drink", "John a Mary gave drink"  # tokens 1 and 2, 3 and 4 in the other order
    >>> with model.edit(hw.PositionInvariant([(1, 3), (3, 5)])):
    ...     first, second = (model(text)[0, -1] for text in texts)
    >>> bool((first - second).abs().max() < 1e-3)
    True
    """

    documents: Any
    reads_tokens = True  # so that running/ids.py clears `memory` when a new run begins

    def named_positions(self) -> list[Positions]:
        return [self._spans()[-1][1] - 1]

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        self._spans()
        _check_rotary(model)
        heads = {layer: torch.ones(model.n_heads, dtype=torch.bool) for layer in model.layers}
        hooks = tuple(ModuleHook(model.attention_module(layer), _note_angles) for layer in model.layers)
        return Prepared(self, heads, Names(model, groups), hooks=hooks)

    def _spans(self) -> list[tuple[int, int]]:
        given = self.documents
        try:
            spans = [(int(first), int(end)) for first, end in given]
        except (TypeError, ValueError):
            raise EditError(
                f"PositionInvariant: documents are pairs [first, end) of positions; got {given!r}"
            ) from None
        if len(spans) < 2 or spans[0][0] < 0 or any(first >= end for first, end in spans):
            raise EditError(
                f"PositionInvariant: two or more documents of one token or more are needed; got {given!r}"
            )
        if any(end != following for (_, end), (following, _) in pairwise(spans)):
            raise EditError(f"PositionInvariant: documents stand one right behind the other; got {given!r}")
        return spans

    def _lower(self, call: LayerCall) -> Lowered:
        def adapt(
            q: Tensor, k: Tensor, rule: ScoreRule, weights: tuple[WeightEdit, ...]
        ) -> tuple[ScoreRule, tuple[WeightEdit, ...]]:
            if call.batch != 1 or rule.mask.valid_keys is not None:
                raise EditError(
                    "PositionInvariant reads one text at a time, without padding; run the texts one by one"
                )
            return self._rule(call, q.detach(), k.detach(), rule), weights

        return Lowered(adapters=(adapt,))

    def _rule(self, call: LayerCall, q: Tensor, k: Tensor, rule: ScoreRule) -> ScoreRule:
        """A rule with the position-invariant scores as its bias, and a mask in which documents see each other."""
        mask = rule.mask
        memory = ids.current(call.names.model.key).memory
        slot = ("rotary", call.layer)
        if mask.query_offset == 0:
            angles = _angles.get()
            assert angles is not None
            memory[slot] = Rotary.of(*angles)
        elif slot not in memory:
            raise EditError(
                "PositionInvariant: this run goes on from a cache that was filled without it; begin with the prompt"
            )
        spans = torch.tensor(self._spans())
        scores = _scores(q[0].double(), k[0].double(), rule, memory[slot], spans, _last_angles())
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        bias = scores[None] if rule.bias is None else scores[None] + rule.bias
        document = _document(spans, mask.query_offset + mask.queries)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            there = document.to(key.device)
            of_query, of_key = there[query], there[key]
            return (key <= query) | ((of_query >= 0) & (of_key >= 0) & (of_query != of_key))

        return replace(
            rule, scale=0.0, softcap=None, bias=bias, mask=replace(mask, right=None, extra=visible)
        )


def _note_angles(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep the rotary angles among the arguments of a layer's attention."""
    _angles.set(kwargs.get("position_embeddings"))


def _last_angles() -> Rotary:
    """The rotary angles of the queries of this call."""
    angles = _angles.get()
    assert angles is not None
    return Rotary.of(*angles)


def _document(spans: Tensor, length: int) -> Tensor:
    """The document of each position, int64 [position]; -1 outside of documents."""
    found = torch.full((length,), -1)
    for number, (first, end) in enumerate(spans.tolist()):
        found[first:end] = number
    return found


def _scores(q: Tensor, k: Tensor, rule: ScoreRule, rotary: Rotary, spans: Tensor, own: Rotary) -> Tensor:
    """PINE's scores [head, query, key] of q [head, query, d] and k [kv head, key, d]: scaled, float64, not masked.

    `rotary` has the angles of all positions, `own` those of this call's queries.
    """
    mask, heads = rule.mask, q.shape[0]
    k = k.repeat_interleave(heads // k.shape[0], 0)
    region, end = int(spans[0, 0]), int(spans[-1, 1])
    lengths = spans[:, 1] - spans[:, 0]
    queries = torch.arange(mask.queries) + mask.query_offset
    bare = own.turn(q, torch.arange(mask.queries), back=True)
    bare_keys = rotary.turn(k[:, region:end], torch.arange(region, end), back=True)
    asked = _document(spans, int(queries[-1]) + 1)[queries]
    behind = _behind(rule.scale * bare @ bare_keys.mT, asked, lengths)  # [head, query, document]

    # a query inside a document reads as if its document were the last one
    places = torch.where(asked >= 0, queries + (end - spans[:, 1])[asked.clamp_min(0)], queries)
    turned = q.clone()
    inside = asked >= 0
    turned[:, inside] = rotary.turn(bare[:, inside], places[inside])
    scores = rule.scale * turned @ k.mT
    for number, (first, stop) in enumerate(spans.tolist()):
        # RoPE scores depend on the distance alone: moving a key back by n equals moving the query forward by n
        keys = rotary.turn(
            bare_keys[:, first - region : stop - region], torch.arange(end - (stop - first), end)
        )
        scores[:, :, first:stop] = rule.scale * rotary.turn(turned, behind[..., number]) @ keys.mT
    # scores of tokens before the documents are wrong here, but the causal mask hides them
    return scores


def _behind(bare: Tensor, asked: Tensor, lengths: Tensor) -> Tensor:
    """For each query, how many tokens of more important documents follow a document, int64 [head, query, document]."""
    member = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    own = asked[:, None] == member[None]
    weights = bare.masked_fill(own[None], float("-inf")).softmax(-1).nan_to_num(0.0)
    importance = torch.stack(
        [weights[..., member == n].sum(-1) / lengths[n] for n in range(len(lengths))], -1
    )
    for number in range(len(lengths)):  # all queries of one document use the same order
        readers = asked == number
        if readers.any():
            importance[:, readers] = importance[:, readers].sum(1, keepdim=True)
            importance[:, readers, number] = float("inf")
    before = importance[..., None, :] > importance[..., :, None]
    return (before * lengths).sum(-1)


def _check_rotary(model: Opened) -> None:
    """EditError for a model whose positions can not be removed from its queries and keys."""
    refused = f"PositionInvariant: {model.name} can not be read so: "
    if not model.causal or compares(model.hf):
        raise EditError(refused + "it is no causal language model")
    found: dict[int, tuple[AttentionMap, tuple[Tensor, Tensor] | None]] = {}
    listener = _Look(model.key, found)
    modules = [model.attention_module(layer) for layer in model.layers]
    with on(modules, before=_note_angles), context.alone(model.key), context.listening(listener):
        forward(model, inputs.read(model, torch.full((1, PROBE), min(5, model.vocab - 1))))
    for layer, (map, angles) in found.items():
        if angles is None:
            raise EditError(refused + f"layer {layer} has no rotary positions; they are what PINE turns")
        if map.rule.sinks is not None or map.rule.mask.left is not None or not map.rule.mask.is_band:
            raise EditError(refused + f"layer {layer} has a window or learned sinks")
        rotary = Rotary.of(*angles)
        for x in (map.q[0].double(), map.k[0].double()):
            bare = rotary.turn(x, torch.arange(PROBE), back=True)
            size = bare.norm()
            if (bare - bare[:, :1]).norm() > 1e-4 * size or (x - x[:, :1]).norm() < 1e-3 * size:
                raise EditError(
                    refused + f"its positions can not be taken out of queries and keys (layer {layer})"
                )


@dataclass(eq=False)
class _Look:
    model: object
    found: dict
    statistics: tuple[str, ...] = ()
    grad: bool = False

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None:
        self.found[layer] = (map, _angles.get())
