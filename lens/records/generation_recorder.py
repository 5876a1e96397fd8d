"""`GenerationRecorder`: a listener that builds one record of a whole text from the steps of its generation.

Every step brings the attention of a few new queries. Plain steps wait for each other, and then the layers of one step
(held_maps.py). Then their statistics are computed, those per key summed, and q, k and log-sum-exp kept (growing.py).
The result equals the record of one run over the whole text. So an edit must mean the same in every step; positions
counted from the end do not: RecordError.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headwater.kernels.edits.patterns import OfMap
from headwater.kernels.edits.weights import WeightStep
from headwater.kernels.maps import statistics as kernel
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context
from headwater.lens.errors import RecordError
from headwater.lens.records import held_maps
from headwater.lens.records.growing import Rows
from headwater.lens.records.record import stack
from headwater.lens.records.recorder import Recorder, refuse_overflow
from headwater.lens.records.steps import HeldRows, StepMasks

SUMS = ("received", "visible")
OF_ROWS = ("queries", "rows")
OF_KEYS = ("keys", "to", "of", "within", "bias")


@dataclasses.dataclass
class _Layer:
    """What the steps so far gave for one layer."""

    kept: dict[str, Rows]
    factors: list[Rows]
    statistics: dict[str, Rows]
    sums: dict[str, Tensor]
    bias: list[Tensor]
    map: AttentionMap | None = None
    waiting: held_maps.Steps = dataclasses.field(default_factory=held_maps.Steps)
    length: int = 0
    masks: StepMasks = dataclasses.field(default_factory=StepMasks)
    held: HeldRows = dataclasses.field(default_factory=HeldRows)


class _Aside(NamedTuple):
    """Some steps of a layer whose statistics are computed with those of other layers."""

    layer: int
    map: AttentionMap
    value: Tensor


class GenerationRecorder:
    """Listener for one generation of at most `longest` tokens, the prompt included."""

    def __init__(self, recorder: Recorder, longest: int, folder: Path | None) -> None:
        self.model = recorder.model
        self.statistics = recorder.statistics
        self.grad = False
        self._recorder = recorder
        self._keeps_maps = recorder.keeps_maps
        self._folder = folder
        self._longest = longest
        ids, mask = recorder.tokens.ids.cpu(), recorder.tokens.mask.cpu()
        self.prompt = ids.shape[1]
        self.ids, self.valid = ids, mask
        self._all_live = bool(mask.all())
        self._groups = stack(recorder.groups)
        if self._groups is not None:
            generated = torch.tensor([name == "generated" for name in recorder.groups])
            more = generated[None, :, None].expand(len(ids), -1, longest - self.prompt)
            self._groups = torch.cat([self._groups.cpu(), more], -1)
        self._rows = [n for n in self.statistics if n not in kernel.COLUMN]
        self._sums = [n for n in SUMS if n in self.statistics or "sink" in self.statistics]
        self._layers: dict[int, _Layer] = {}
        self._aside: list[_Aside] = []
        self._residuals: dict[int | str, Rows] = {}

    def close(self) -> None:
        """Close the temporary files, also of an unfinished generation."""
        layers = (rows for layer in self._layers.values() for rows in (*layer.kept.values(), *layer.factors))
        for rows in (*layers, *self._residuals.values()):
            rows.close()

    def chosen(self, tokens: Tensor, live: Tensor) -> None:
        """Add the next token of each row, [batch]; `live` is False for rows that had ended before it."""
        self._all_live = self._all_live and bool(live.all())
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.valid = torch.cat([self.valid, live[:, None]], 1)

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None:
        if layer not in self._recorder.layers:
            refuse_overflow(layer, map)
            return
        map = self._marked(map)
        if self._aside and self._aside[0].layer == layer:
            self._keep_aside()
        mask = map.rule.mask
        rows, own = mask.queries, mask.shift
        so_far = self._layers.get(layer)
        if so_far is None:
            so_far = self._layers[layer] = self._new(map)
        if mask.query_offset != so_far.length or own < 0 or own + rows > mask.keys:
            raise RecordError(
                f"layer {layer} was given position {mask.query_offset} after {so_far.length} others; record=True takes "
                "decoding with a cache that reads every position once (no beams, no assistant, use_cache=True)"
            )
        if self._keeps_maps:
            self._check_edits(layer, map)
            so_far.masks.add(mask)
            so_far.held.add(map)
        waits = not self._changed()
        if not (waits and so_far.waiting.takes(map)):
            self._end_waiting(layer, so_far)
            waits = waits and so_far.waiting.takes(map)
        if waits:
            so_far.waiting.add(map, value)
        elif held_maps.waits(map):
            self._put_aside(_Aside(layer, map, value))
        else:
            self._keep_aside()
            self._keep([_Aside(layer, map, value)])
        so_far.map = map
        so_far.length += rows
        # what is NaN in one layer is so in all behind it
        if layer == self._recorder.layers[-1] and bool(map.lse.isnan().any()):
            self._end_all()

    def _end_all(self) -> None:
        for layer, so_far in self._layers.items():
            self._end_waiting(layer, so_far)
        self._keep_aside()

    def _end_waiting(self, layer: int, so_far: _Layer) -> None:
        """Make the steps that wait one map of some rows: the keys and values of the last step hold those of all."""
        value = so_far.waiting.value
        if value is not None:
            map, so_far.waiting = so_far.waiting.below(), held_maps.Steps()
            self._put_aside(_Aside(layer, map, value))

    def _put_aside(self, some: _Aside) -> None:
        """Let a map wait for those of the layers behind it, at most until its own layer comes again."""
        aside = self._aside
        if aside and not held_maps.fits(some.map, aside[0].map, len(aside)):
            self._keep_aside()
        self._aside.append(some)

    def _keep_aside(self) -> None:
        aside, self._aside = self._aside, []
        if aside:
            self._keep(aside)

    def _keep(self, some: Sequence[_Aside]) -> None:
        """Keep maps of some layers, with statistics of all at once."""
        maps = [each.map for each in some]
        together = maps[0] if len(maps) == 1 else held_maps.beside(maps)
        if bool(together.lse.isnan().any()):
            for each in some:
                refuse_overflow(each.layer, each.map)
        found = held_maps.apart(self._measured(together), len(maps))
        for n, each in enumerate(some):
            so_far = self._layers[each.layer]
            self._add(so_far, {name: values[:, n] for name, values in found.items()}, each.map)
            self._append(so_far, each.map, each.value)

    def _append(self, so_far: _Layer, map: AttentionMap, value: Tensor) -> None:
        own = slice(map.rule.mask.shift, map.rule.mask.shift + map.shape[2])
        if self._keeps_maps:
            so_far.kept["q"].append(map.q)
            so_far.kept["k"].append(map.k[:, :, own])
            so_far.kept["lse"].append(map.lse)
            for kept, found in zip(so_far.factors, (f for s in map.steps for f in s.factors), strict=True):
                kept.append(found)
            if map.rule.bias is not None:
                so_far.bias.append(map.rule.bias)
        if "qkv" in self._recorder.keep:
            so_far.kept["value"].append(value[:, :, own])

    def take_residual(self, place: int | str, stream: Tensor) -> None:
        if place == "final" or place in self._recorder.layers:
            self._residuals.setdefault(place, Rows(1, self._folder)).append(stream)

    def finish(self) -> None:
        """Give every layer to the recorder, as one run over the whole text would."""
        recorder = self._recorder
        length = self.ids.shape[1]
        recorder.tokens = type(recorder.tokens)(self.ids, self.valid)
        if self._groups is not None:
            groups = self._groups[..., :length].unbind(1)
            recorder.groups = dict(zip(recorder.groups, groups, strict=True))
        self._end_all()
        for layer in list(self._layers):
            so_far = self._layers.pop(layer)
            if so_far.length != length:
                raise RecordError(
                    f"layer {layer} read {so_far.length} of {length} positions; record=True takes decoding with a cache"
                )
            found = {name: rows.joined() for name, rows in so_far.statistics.items()}
            found |= {name: values[..., :length].contiguous() for name, values in so_far.sums.items()}
            if "sink" in self.statistics:
                seen = found["visible"]
                found["sink"] = found["received"] / torch.where(seen > 0, seen, torch.nan)
            found = {name: found[name] for name in self.statistics}
            map = self._whole(layer, so_far, length) if recorder.keeps_maps else None
            recorder.put(layer, found, map, so_far.kept["value"].joined() if "qkv" in recorder.keep else None)
        for place in list(self._residuals):
            recorder.take_residual(place, self._residuals.pop(place).joined())

    def _new(self, map: AttentionMap) -> _Layer:
        batch, heads = map.shape[:2]
        kinds = {"received": torch.float32, "visible": torch.int64}
        kept = {name: Rows(2, self._folder) for name in ("q", "k", "lse", "value")}
        factors = [Rows(2, self._folder) for step in map.steps for _ in step.factors]
        statistics = {n: Rows(-1, None) for n in self._rows}
        totals = {n: torch.zeros(batch, heads, self._longest, dtype=kinds[n]) for n in self._sums}
        return _Layer(kept, factors, statistics, totals, [])

    def _marked(self, map: AttentionMap) -> AttentionMap:
        """The map with the rows of ended texts marked as padding."""
        if self._all_live:
            return map
        first = map.rule.mask.query_offset
        live = self.valid[:, first : first + map.shape[2]]
        if live.shape[1] != map.shape[2] or bool(live.all()):
            return map
        silent = ~live[:, None].to(map.lse.device)
        rule = replace(map.rule, mask=replace(map.rule.mask, valid_queries=live))
        return replace(map, rule=rule, lse=map.lse.masked_fill(silent, torch.inf), known={})

    def _changed(self) -> bool:
        """Whether keys of a later step may be others than those that this step saw."""
        return bool(context.active(self.model)) or context.current_tap(self.model) is not context.NO_TAP

    def _measured(self, map: AttentionMap) -> dict[str, Tensor]:
        first = map.rule.mask.key_offset
        groups = self._groups
        if groups is not None:
            groups = torch.nn.functional.pad(groups, (0, max(first + map.shape[3] - self._longest, 0)))
            groups = groups[..., first : first + map.shape[3]]
        return map.statistics((*self._rows, *self._sums), groups)

    def _add(self, so_far: _Layer, found: dict[str, Tensor], map: AttentionMap) -> None:
        """Add the statistics of some steps to those of the steps before."""
        first = map.rule.mask.key_offset
        last = min(first + map.shape[3], self._longest)
        for name, rows in so_far.statistics.items():
            values = found[name]
            rows.append(values.where(values < 0, values + first) if name == "argmax" else values)
        for name, total in so_far.sums.items():
            total[..., first:last] += found[name][..., : last - first]

    # --- the rule of the whole text

    def _mask(self, map: AttentionMap, length: int, valid: Tensor) -> Mask:
        documents = map.rule.mask.documents
        if documents is not None and documents.shape[1] < length:
            documents = None  # they cover only the tokens so far, and no edit depends on them
        mask = replace(
            map.rule.mask, queries=length, keys=length, query_offset=0, key_offset=0,
            valid_keys=None, valid_queries=None, start=None, stop=None, documents=documents,
        )  # fmt: skip
        if bool(valid.all()):
            return mask
        start, stop = valid.long().argmax(-1), length - valid.flip(-1).long().argmax(-1)
        return replace(mask, valid_keys=valid, valid_queries=valid, start=start, stop=stop)

    def _lowered(self, layer: int, map: AttentionMap) -> tuple[tuple, tuple]:
        """The active score edits and weight edits, lowered for the longest possible text."""
        valid = self.valid[:, : self.prompt]
        later = torch.ones(len(valid), self._longest - self.prompt, dtype=torch.bool)
        mask = self._mask(map, self._longest, torch.cat([valid, later], 1))
        edits = context.active(self.model)
        lowered = context.Lowered.joined([edit.lower(layer, mask, len(valid)) for edit in edits])
        return lowered.scores, lowered.weights

    def _check_edits(self, layer: int, map: AttentionMap) -> None:
        if not (map.rule.edits or map.steps):
            return
        mask = map.rule.mask
        now = map.rule.edits, tuple(step.edit for step in map.steps)
        edits = context.active(self.model)
        if by_token := [edit for edit in edits if edit.reads_tokens]:
            raise RecordError(
                f"{_names(by_token)}: an edit that goes by the tokens themselves (text, groups, sinks by rule) can not "
                "be written into one map of a growing text; name positions by number, or use keep=() for statistics"
            )
        rows = slice(mask.query_offset, mask.query_offset + mask.queries)
        keys = slice(mask.key_offset, mask.key_offset + mask.keys)
        whole = tuple(tuple(_window(e, rows, keys) for e in edits) for edits in self._lowered(layer, map))
        if not _same(whole, now):
            raise RecordError(
                f"{_names(edits)}: an edit means something else in each step of the generation (positions from the "
                "end, or what depends on the text so far), so no one map holds it; use keep=() for statistics alone"
            )

    def _whole(self, layer: int, so_far: _Layer, length: int) -> AttentionMap:
        map = so_far.map
        assert map is not None
        span = slice(0, length)
        scores, weights = (
            tuple(_window(e, span, span) for e in edits) for edits in self._lowered(layer, map)
        )
        factors = (rows.joined() for rows in so_far.factors)
        steps = [
            WeightStep(edit, tuple(itertools.islice(factors, len(step.factors))))
            for edit, step in zip(weights, map.steps, strict=True)
        ]
        mask = so_far.masks.whole(so_far.masks.hiding(self._mask(map, length, self.valid)))
        rule = replace(map.rule, mask=mask, edits=scores, bias=_bias(so_far.bias, length))
        q, k, lse = (so_far.kept[name].joined() for name in ("q", "k", "lse"))
        whole = AttentionMap(q, k, rule, lse, tuple(steps), map.backend)
        so_far.held.hold(layer, whole)
        return whole


def _bias(pieces: list[Tensor], length: int) -> Tensor | None:
    """The score bias of the whole text: the last one if all queries share one row, else all rows joined."""
    if not pieces:
        return None
    if pieces[-1].shape[2] == 1 and pieces[0].shape[2] == 1 and len({p.shape[3] for p in pieces}) == 1:
        return pieces[-1][..., :length]
    padded = [torch.nn.functional.pad(p[..., :length], (0, max(length - p.shape[3], 0))) for p in pieces]
    return torch.cat(padded, 2)


def _window(edit: Any, rows: slice, keys: slice) -> Any:
    """A lowered edit of the whole text, cut to some rows and columns."""
    changed = {}
    for field in dataclasses.fields(edit):
        value = getattr(edit, field.name)
        if isinstance(value, Tensor) and field.name in (*OF_ROWS, *OF_KEYS):
            changed[field.name] = value[..., rows if field.name in OF_ROWS else keys]
        elif field.name == "condition" and value is not None:
            changed[field.name] = _window(value, rows, keys)
    return replace(edit, **changed)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, OfMap):
        return a.map is b.map
    if dataclasses.is_dataclass(a):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


def _names(edits: Iterable[context.ActiveEdit]) -> str:
    return ", ".join(dict.fromkeys(type(edit.user_edit or edit).__name__ for edit in edits))
