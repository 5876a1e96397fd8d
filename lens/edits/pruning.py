"""The hooks by which tokens are removed behind a layer (`PruneTokens`), and the check that a model can take them.

A hook before each later block takes the kept tokens out of the hidden states, and one behind it puts them back among
NaN, so that what runs between the blocks, hidden states and records keep their places. Positions (rotary embeddings,
learned ones) stay those of the whole sequence, and a cache holds, by layer, what that layer read.

In a language model behind a tower whose tokens were removed, the image tokens without an embedding are removed too:
they are hidden in the first layer, by whose cache transformers counts positions, and gone from the second on. (The code
of FlowCut numbers the tokens that are left anew; here they keep their positions.)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import StaticLayer

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context, module_hooks, shortening
from headwater.lens.attention.shortening import Call, Places, Short
from headwater.lens.edits import token_scores
from headwater.lens.edits.base import ModuleHook
from headwater.lens.edits.named_positions import Names
from headwater.lens.edits.recycled_tokens import recycled
from headwater.lens.edits.shortened_arguments import shortened
from headwater.lens.errors import EditError
from headwater.lens.models import blocks
from headwater.lens.models.opened import Opened
from headwater.lens.naming.positions import Positions


@dataclass(frozen=True, eq=False)
class Plan:
    """What `PruneTokens` says, checked: its settings, with `given` the scores as numbers (None: scores by name)."""

    keep: Mapping[int, int | float]
    score: str = "values"
    positions: Positions = "image"
    adaptive: bool = False
    recycle: int = 0
    mix: float = 0.5
    seed: int = 0
    given: Tensor | None = None
    prior: Tensor | None = None


@dataclass(eq=False)
class _Run:
    """One run of the prompt and what follows it. `kept` are the tokens of the prompt that are left, bool [batch,
    position]; `columns` what each layer knows of the text so far, None for all of it."""

    kept: Tensor
    length: int
    first: int = 0
    columns: dict[int, Places | None] = field(default_factory=dict)
    candidates: Tensor | None = None
    scores: Tensor | None = None  # [batch, position]
    carried: Tensor | None = None
    attending: Tensor | None = None
    reader: Tensor | None = None  # the place of the token that reads, [batch]
    places: Places | None = None


_runs: ContextVar[Mapping[object, _Run]] = ContextVar("headwater_pruned_runs", default=MappingProxyType({}))
_caches: WeakKeyDictionary[Cache, dict[object, _Run]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Pruning:
    """The hooks of one part; without a `plan` they remove what came as NaN from a tower below."""

    model: Opened
    names: Names
    plan: Plan | None = None

    def hooks(self) -> tuple[ModuleHook, ...]:
        around = {layer: blocks.block(self.model, layer).module for layer in self.model.layers}
        return tuple(
            ModuleHook(
                module,
                functools.partial(self.before, layer),
                functools.partial(self.after, layer),
                early=True,
            )
            for layer, module in around.items()
        )

    def before(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shortening_edits = sum(edit.shortens for edit in context.active(self.model.key))
        if self.plan is None and shortening_edits:
            return None  # an edit of this part does it
        if shortening_edits > 1:
            raise EditError(
                f"PruneTokens: {shortening_edits} of them are on in one part; name all layers in one, as in "
                "keep={1: 0.5, 3: 0.25}"
            )
        x = module_hooks.hidden_states(args, kwargs)
        if x.dim() != 3:
            raise EditError(
                f"PruneTokens: {type(module).__name__} reads {list(x.shape)}, not [batch, position, d_model]; "
                "no token can be removed there"
            )
        if layer == self.model.layers[0]:
            x = self._begin(x, next((c for c in (*args, *kwargs.values()) if isinstance(c, Cache)), None))
        run = _runs.get()[self.model.key]
        rows = columns = None
        if run.first:
            known = run.columns.get(layer)
            columns = None if known is None else known.behind(run.first, run.length - run.first)
        elif not run.kept.all():
            if layer == self.model.layers[0]:
                everything = torch.arange(run.length).expand(len(run.kept), -1)
                rows = columns = Places(everything, run.kept)
            else:
                run.places = run.places or Places.of(run.kept)
                rows = columns = run.places
        run.columns[layer] = columns
        short = None if columns is None else Short(x.shape[1], run.length, rows, columns)
        tells = not run.first and self._listens(layer)
        tell = functools.partial(self._hear, layer, run) if tells else None
        shortening.begin(Call(self.model.key, layer, short, tell))
        if rows is None:
            return None
        # what fills up a row that kept fewer is hidden, but a weight of 0 on NaN would be NaN
        held = rows.taken(x, 1).masked_fill(~rows.real[..., None].to(x.device), 0.0)
        return shortened(module, args, kwargs, held, x.shape[1], rows)

    def after(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        call = shortening.of(self.model.key, layer)
        run = _runs.get().get(self.model.key)
        shortening.begin(None)
        if call is None or run is None or run.first:
            return None
        x, changed = module_hooks.first_output(output), False
        if call.short is not None and call.short.rows is not None:
            x, changed = call.short.rows.put(x, 1, call.short.queries, torch.nan), True
        if self.plan is not None and self._acts(layer):
            x, changed = self._remove(layer, run, x), True
        return module_hooks.with_first_output(output, x) if changed else None

    def _begin(self, x: Tensor, cache: Cache | None) -> Tensor:
        """Start the run, or go on with that of the cache; the states without those of removed tokens."""
        key, batch, count = self.model.key, *x.shape[:2]
        if cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers):
            raise EditError(
                "PruneTokens: a static cache has one length for all layers; leave cache_implementation out"
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        if past:
            run = _caches.get(cache, {}).get(key) if cache is not None else None
            if run is None:
                raise EditError(
                    "PruneTokens: this run goes on from a cache that was filled without it; begin with the prompt"
                )
            run.first, run.length = past, past + count
        else:
            run = _Run(torch.ones(batch, count, dtype=torch.bool), count)
            if self._behind_a_pruned_tower():
                run.kept = ~x.isnan().any(-1).cpu()
                x = x.nan_to_num(0.0)
            if cache is not None:
                _caches.setdefault(cache, {})[key] = run
        _runs.set({**_runs.get(), key: run})
        return x

    def _behind_a_pruned_tower(self) -> bool:
        others = (key for key in self.model.part_keys.values() if key is not self.model.key)
        return any(edit.shortens for key in others for edit in context.active(key))

    def _acts(self, layer: int) -> bool:
        """Whether tokens are removed behind this layer."""
        if self.plan is None:
            return False
        last = max(self.plan.keep)
        return layer in self.plan.keep or (self.plan.adaptive and layer < last and (last - layer) % 2 == 0)

    def _listens(self, layer: int) -> bool:
        """Whether the scores need the attention of this layer."""
        carried = self.plan is not None and self.plan.score == "flow" and layer <= max(self.plan.keep)
        return carried or self._acts(layer)

    def _hear(
        self, layer: int, run: _Run, mask: Mask, map: AttentionMap, value: Tensor, columns: Places | None
    ) -> None:
        """Score the tokens by the attention of one layer, [batch, position] of the whole sequence."""
        assert self.plan is not None
        batch, _, queries, keys = map.shape
        length = mask.keys
        picked = self.names.select(self.plan.positions, mask, "query", layer)
        valid = mask.valid_queries
        picked = picked if valid is None or layer != self.model.layers[0] else picked & valid
        if run.candidates is None:
            run.candidates = picked.expand(batch, -1).clone()
        reader = token_scores.reader_of(self.model)
        rows = token_scores.reading_rows(reader, map.rule.mask.valid_queries, batch, queries)
        if rows is not None:
            run.reader = rows if columns is None else columns.at.gather(1, rows[:, None])[:, 0]
        there = columns or Places(torch.arange(keys).expand(batch, -1), run.kept)
        left = run.candidates & run.kept
        left = left if run.reader is None else left.scatter(1, run.reader[:, None], False)
        among = there.taken(left, 1) & there.real
        shown = map.rule.mask.valid_keys
        attending = token_scores.attention(map, rows)
        strong = token_scores.strength(value)
        run.attending = there.put(attending, 1, length, 0.0)
        if self.plan.score == "flow":
            related = None if rows is None else token_scores.relation(value, rows, shown)
            before = None if run.carried is None else there.taken(run.carried, 1)
            run.carried = there.put(
                token_scores.flow(attending, related, strong, among, before), 1, length, 0.0
            )
            run.scores = run.carried
        elif self.plan.score == "values":
            run.scores = there.put(strong, 1, length, 0.0)
        elif self.plan.score == "random":
            if run.scores is None:
                run.scores = torch.rand(
                    batch, length, generator=torch.Generator().manual_seed(self.plan.seed)
                )
        else:
            run.scores = (
                run.attending
                if self.plan.given is None
                else _placed(self.plan.given, run.candidates, "score")
            )

    def _remove(self, layer: int, run: _Run, x: Tensor) -> Tensor:
        """x [batch, position, d_model] with NaN for what is removed here; `run.kept` without it."""
        plan = self.plan
        assert plan is not None
        assert run.candidates is not None
        assert run.scores is not None
        everything = run.candidates.sum(-1)
        among = run.candidates & run.kept
        if run.reader is not None:
            among = among.scatter(1, run.reader[:, None], False)
        last = max(plan.keep)
        left = plan.keep.get(layer, plan.keep[last])
        target = (everything * left).ceil().long() if isinstance(left, float) else everything.clamp(max=left)
        if layer not in plan.keep:
            assert run.attending is not None
            cut = token_scores.to_remove(run.attending, among, last - layer, target)
            target = torch.maximum(among.sum(-1) - cut, target)
        if run.reader is not None:  # it is one of those that are left where it is a candidate
            target = target - run.candidates.gather(1, run.reader[:, None])[:, 0].long()
        scores = run.scores
        if plan.prior is not None:
            prior = _placed(plan.prior, run.candidates, "prior")
            scores = (1 - plan.mix) * token_scores.shares(scores, among)
            scores = scores + plan.mix * token_scores.shares(prior, among)
        order = scores.masked_fill(~among, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
        stays = rank < target[:, None]
        if plan.recycle:
            anchors = among & ~stays & (rank < target[:, None] + plan.recycle)
            x = recycled(x, anchors, among & ~stays & ~anchors)
            stays = stays | anchors
        run.kept, run.places = run.kept & (~among | stays), None
        return x.masked_fill(~run.kept[..., None].to(x.device), torch.nan)


def _placed(given: Tensor, candidates: Tensor, what: str) -> Tensor:
    """Numbers of the candidates in their order at their places, float32 [batch, position], 0 elsewhere."""
    counts = candidates.sum(-1)
    rows = given.expand(len(candidates), -1) if given.dim() == 1 else given
    if len(rows) != len(candidates) or bool((counts != rows.shape[1]).any()):
        raise EditError(
            f"PruneTokens: {what} has numbers {list(given.shape)}, but the positions are "
            f"{', '.join(map(str, counts.tolist()))} tokens in {len(candidates)} rows"
        )
    found = torch.zeros(candidates.shape)
    found[candidates] = rows.reshape(-1)
    return found
